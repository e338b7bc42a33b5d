#!lua flags=no-writes
-- KEYS 1 replicas. Returns the records whose time has not run out by this server's clock.
local clock = redis.call('TIME')
local now_ms = clock[1] * 1000 + math.floor(clock[2] / 1000)

local alive = {}
for _, value in ipairs(redis.call('HVALS', KEYS[1])) do
  local expires_ms, record = string.match(value, '^(%d+) %S+ %S+ (.*)$')
  if tonumber(expires_ms) > now_ms then
    alive[#alive + 1] = record
  end
end
return alive
