#!lua flags=allow-oom
-- ARGV 2 the holder's field
local holder = redis.call('HGET', META, ARGV[2])
if holder then
  local bytes = cjson.decode(holder).bytes
  redis.call('HDEL', META, ARGV[2])
  redis.call('HINCRBY', META, 'bytes', int(-bytes))
  charge(-bytes)
end
return {'OK'}
