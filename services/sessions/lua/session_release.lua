#!lua flags=allow-oom
-- ARGV 2 owner. An overtaken lease is left to its new owner.
if redis.call('HGET', META, 'owner') == ARGV[2] then
  redis.call('HDEL', META, 'owner', 'lease_ms')
end
return {'OK'}
