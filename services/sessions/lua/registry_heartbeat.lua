#!lua
-- KEYS 1 replicas. ARGV 1 field, 2 incarnation, 3 started at (s), 4 ttl in ms, 5 record (JSON)
-- A value is "<expiry in ms> <incarnation> <started at> <record>". Expired ones of others go here, so reading writes nothing.
local clock = redis.call('TIME')
local now_ms = clock[1] * 1000 + math.floor(clock[2] / 1000)
local last_ms = now_ms + tonumber(ARGV[4])

local flat = redis.call('HGETALL', KEYS[1])
for i = 1, #flat, 2 do
  local expires_ms, incarnation, started = string.match(flat[i + 1], '^(%d+) (%S+) (%S+) ')
  if tonumber(expires_ms) <= now_ms then
    redis.call('HDEL', KEYS[1], flat[i])
  elseif flat[i] == ARGV[1] and incarnation ~= ARGV[2] and tonumber(started) > tonumber(ARGV[3]) then
    return 'OVERTAKEN'
  else
    last_ms = math.max(last_ms, tonumber(expires_ms))
  end
end

local expires_ms = string.format('%.0f', now_ms + tonumber(ARGV[4]))
redis.call('HSET', KEYS[1], ARGV[1], table.concat({expires_ms, ARGV[2], ARGV[3], ARGV[5]}, ' '))
redis.call('PEXPIREAT', KEYS[1], string.format('%.0f', last_ms))
return 'OK'
