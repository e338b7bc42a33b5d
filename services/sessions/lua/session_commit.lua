#!lua
-- ARGV 2 owner, 3 fence, 4 turn, 5 journal entry, 6 prompt tokens, 7 generated tokens, 8 idempotency digest or '',
-- 9 overhead bytes, 10 quota, then for each holder: field, value, bytes
local turn, entry, FIRST_HOLDER = ARGV[4], ARGV[5], 11

local meta = read_meta()
if not meta.schema then
  return {'MISSING'}
end
if meta.owner ~= ARGV[2] or meta.fence ~= ARGV[3] then
  if mark_of(redis.call('LINDEX', TURNS, turn - 1)) == mark_of(entry) then
    return {'OK', now_us, redis.call('HGETALL', META)} -- the client sends it again because the reply was lost
  end
  return {'STALE'}
end

local journal_bytes = meta.journal_bytes + #entry
local bytes = tonumber(ARGV[9]) + journal_bytes
for i = FIRST_HOLDER, #ARGV, 3 do
  bytes = bytes + tonumber(ARGV[i + 2])
end
local growth = bytes - meta.bytes
if growth > 0 and not has_room(growth, tonumber(ARGV[10])) then
  return {'FULL'}
end

for field in pairs(meta) do
  if string.sub(field, 1, 7) == 'holder:' then
    redis.call('HDEL', META, field)
  end
end
for i = FIRST_HOLDER, #ARGV, 3 do
  redis.call('HSET', META, ARGV[i], ARGV[i + 1])
end

redis.call('RPUSH', TURNS, entry)
redis.call('HDEL', META, 'owner', 'lease_ms')
redis.call('HSET', META,
  'num_turns', turn, 'num_prompt', int(meta.num_prompt + ARGV[6]), 'num_generated', int(meta.num_generated + ARGV[7]),
  'journal_bytes', int(journal_bytes), 'bytes', int(bytes),
  'key:' .. int(turn % 4), turn .. ' ' .. ARGV[8])
charge(growth)
keep_until(now_ms + meta.ttl_ms)
return {'OK', now_us, redis.call('HGETALL', META)}
