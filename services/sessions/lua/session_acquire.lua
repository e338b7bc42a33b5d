#!lua
-- ARGV 2 owner, 3 lease ttl in ms, 4 idempotency digest or '', 5 needed bytes, 6 quota, 7 known turns, 8 mark of the last
local owner, lease_ttl_ms, idempotency, known = ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[7])

local meta = read_meta()
if not meta.schema then
  return {'MISSING'}
end

if idempotency ~= '' then
  for slot = 0, 3 do
    local turn, key = string.match(meta['key:' .. slot] or '', '^(%d+) (%x*)$')
    if key == idempotency then
      return {'COMMITTED', now_us, redis.call('HGETALL', META), turn, redis.call('LINDEX', TURNS, turn - 1)}
    end
  end
end

if meta.owner ~= owner then -- else the client sends it again because the reply was lost
  if meta.owner and tonumber(meta.lease_ms) > now_ms then
    return {'BUSY', meta.num_turns + 1}
  end
  sweep(16)
  if not has_room(tonumber(ARGV[5]), tonumber(ARGV[6])) then
    return {'FULL'}
  end
  -- From the clock, so that it also grows when the session was made anew, or a failover lost the last one.
  meta.fence = int(math.max(now_us, meta.fence + 1))
end

local lease_ms = now_ms + lease_ttl_ms
redis.call('HSET', META, 'fence', meta.fence, 'owner', owner, 'lease_ms', int(lease_ms))
keep_until(math.max(now_ms + meta.ttl_ms, lease_ms))

if known > 0 and mark_of(redis.call('LINDEX', TURNS, known - 1)) ~= ARGV[8] then
  known = 0
end
return {'OK', now_us, redis.call('HGETALL', META), known, redis.call('LRANGE', TURNS, known, -1)}
