#!lua flags=allow-oom
-- KEYS 1 replicas. ARGV 1 field, 2 incarnation. A newer incarnation of the replica is left alone.
local value = redis.call('HGET', KEYS[1], ARGV[1])
if value and string.match(value, '^%d+ (%S+) ') == ARGV[2] then
  redis.call('HDEL', KEYS[1], ARGV[1])
end
return 'OK'
