#!lua
-- ARGV 2 owner, 3 fence, 4 lease ttl in ms
local meta = read_meta()
if not meta.schema then
  return {'MISSING'}
elseif meta.owner ~= ARGV[2] or meta.fence ~= ARGV[3] then
  return {'STALE'}
end
local lease_ms = now_ms + tonumber(ARGV[4])
redis.call('HSET', META, 'lease_ms', int(lease_ms))
keep_until(math.max(now_ms + meta.ttl_ms, lease_ms))
return {'OK', int(lease_ms)}
