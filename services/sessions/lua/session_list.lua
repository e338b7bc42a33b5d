#!lua
-- ARGV 2 number of sessions, 3 the creation time (us) that they are older than, or '+inf'. Returns their digests, newest first.
sweep(128)
local found = redis.call('ZREVRANGEBYSCORE', SESSIONS, ARGV[3], '-inf', 'WITHSCORES', 'LIMIT', 0, ARGV[2])
return {'OK', now_us, found}
