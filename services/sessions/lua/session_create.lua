#!lua
-- ARGV 2 session id, 3 nonce, 4 model, 5 template digest, 6 ttl in ms, 7 overhead bytes, 8 quota, 9 schema version
local nonce, ttl_ms, overhead = ARGV[3], tonumber(ARGV[6]), tonumber(ARGV[7])

local existing = redis.call('HGET', META, 'nonce')
if existing == nonce then -- the client sends a command again when the reply was lost
  return {'OK', now_us, redis.call('HGETALL', META)}
elseif existing then
  return {'EXISTS'}
end

forget(DIGEST)
sweep(16)
if not has_room(overhead, tonumber(ARGV[8])) then
  return {'FULL'}
end

-- Strictly increasing, also when the clock steps back: pages of the list go by it.
local newest = redis.call('ZREVRANGE', SESSIONS, 0, 0, 'WITHSCORES')[2]
local created_us = math.max(now_us, tonumber(newest or '0') + 1)
redis.call('HSET', META,
  'schema', ARGV[9], 'session_id', ARGV[2], 'nonce', nonce, 'model', ARGV[4], 'template', ARGV[5],
  'ttl_ms', int(ttl_ms), 'created_us', int(created_us), 'num_turns', '0', 'num_prompt', '0', 'num_generated', '0',
  'journal_bytes', '0', 'bytes', int(overhead), 'fence', '0')
redis.call('ZADD', SESSIONS, int(created_us), DIGEST)
charge(overhead)
keep_until(now_ms + ttl_ms)
return {'OK', now_us, redis.call('HGETALL', META)}
