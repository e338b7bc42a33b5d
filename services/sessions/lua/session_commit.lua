#!lua
-- ARGV 2 owner, 3 fence, 4 journal entry, 5 prompt tokens, 6 generated tokens, 7 idempotency digest or '',
-- 8 overhead bytes, 9 quota, then for each holder: field, value, bytes
local owner, entry = ARGV[2], ARGV[4]

local meta = read_meta()
if not meta.schema then
  return {'MISSING'}
end
for slot = 0, 3 do
  local _, committed = string.match(meta['commit:' .. slot] or '', '^(%d+) (%x+) (%x*)$')
  if committed == owner then -- the client sends it again because the reply was lost
    return {'OK', now_us, redis.call('HGETALL', META)}
  end
end
if meta.owner ~= owner or meta.fence ~= ARGV[3] then
  return {'STALE'}
end

local journal_bytes = meta.journal_bytes + #entry
local bytes = tonumber(ARGV[8]) + journal_bytes
for i = 10, #ARGV, 3 do
  bytes = bytes + tonumber(ARGV[i + 2])
end
local growth = bytes - meta.bytes
if growth > 0 and not has_room(growth, tonumber(ARGV[9])) then
  return {'FULL'}
end

for field in pairs(meta) do
  if string.sub(field, 1, 7) == 'holder:' then
    redis.call('HDEL', META, field)
  end
end
for i = 10, #ARGV, 3 do
  redis.call('HSET', META, ARGV[i], ARGV[i + 1])
end

local turn = meta.num_turns + 1
redis.call('RPUSH', TURNS, entry)
redis.call('HDEL', META, 'owner', 'lease_ms')
redis.call('HSET', META,
  'num_turns', int(turn), 'num_prompt', int(meta.num_prompt + ARGV[5]), 'num_generated', int(meta.num_generated + ARGV[6]),
  'journal_bytes', int(journal_bytes), 'bytes', int(bytes),
  'commit:' .. int(turn % 4), int(turn) .. ' ' .. owner .. ' ' .. ARGV[7])
charge(growth)
keep_until(now_ms + meta.ttl_ms)
return {'OK', now_us, redis.call('HGETALL', META)}
