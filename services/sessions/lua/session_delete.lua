#!lua flags=allow-oom
if redis.call('EXISTS', META) == 0 then
  return {'MISSING'}
end
redis.call('DEL', META, TURNS)
forget(DIGEST)
return {'OK'}
