-- Stands before every session script. They all get the same keys, of one tenant and so of one slot:
--   KEYS 1 sessions, 2 expiry, 3 bytes, 4 meta, 5 turns (services/sessions/keys.py); ARGV 1 is the session's digest.
-- Fields of meta:
--   schema nonce session_id model template ttl_ms created_us updated_ms expires_ms
--   num_turns num_prompt num_generated journal_bytes bytes
--   fence; owner and lease_ms while a lease exists
--   key:<turn mod 4> = "<turn> <idempotency digest or nothing>"; holder:<replica>:<incarnation> = JSON
local SESSIONS, EXPIRY, BYTES, META, TURNS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local DIGEST = ARGV[1]

local clock = redis.call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
local now_ms = math.floor(now_us / 1000)

-- Lua writes large numbers as 1.76e+15; adding zero makes -0 a 0.
local function int(number)
  return string.format('%.0f', number + 0)
end

local function read_meta()
  local flat, meta = redis.call('HGETALL', META), {}
  for i = 1, #flat, 2 do
    meta[flat[i]] = flat[i + 1]
  end
  return meta
end

-- The mark of a journal entry, which is its lease's owner in binary; '' if there is no such turn.
local function mark_of(entry)
  return string.sub(entry or '', 2, 17)
end

local function charge(bytes)
  redis.call('HINCRBY', BYTES, DIGEST, int(bytes))
  redis.call('HINCRBY', BYTES, 'total', int(bytes))
end

-- Gives back what a session is charged and takes it off the tenant's lists.
local function forget(digest)
  local held = redis.call('HGET', BYTES, digest) or '0'
  redis.call('HDEL', BYTES, digest)
  if redis.call('HINCRBY', BYTES, 'total', int(-held)) == 0 then
    redis.call('HDEL', BYTES, 'total')
  end
  redis.call('ZREM', SESSIONS, digest)
  redis.call('ZREM', EXPIRY, digest)
end

-- Redis removes a session's own keys at its expiry; this does the same to what the tenant is charged for it.
-- A second of grace, so that no session is forgotten here before its keys are gone.
local function sweep(limit)
  local expired = redis.call('ZRANGEBYSCORE', EXPIRY, '-inf', int(now_ms - 1000), 'LIMIT', 0, limit)
  for _, digest in ipairs(expired) do
    forget(digest)
  end
  return #expired
end

-- Whether so many bytes more are within the quota (-1: there is none), after giving back all that expired if need be.
local function has_room(bytes, quota)
  if quota < 0 then
    return true
  end
  repeat
    if tonumber(redis.call('HGET', BYTES, 'total') or '0') + bytes <= quota then
      return true
    end
  until sweep(128) == 0
  return false
end

-- The session's keys end at that time unless it is used again, and the tenant's an hour after its last session.
local function keep_until(expires_ms)
  redis.call('HSET', META, 'expires_ms', int(expires_ms), 'updated_ms', int(now_ms))
  redis.call('PEXPIREAT', META, int(expires_ms))
  redis.call('PEXPIREAT', TURNS, int(expires_ms))
  redis.call('ZADD', EXPIRY, int(expires_ms), DIGEST)
  local last_ms = tonumber(redis.call('ZREVRANGE', EXPIRY, 0, 0, 'WITHSCORES')[2]) + 3600000
  for _, key in ipairs({SESSIONS, EXPIRY, BYTES}) do
    redis.call('PEXPIREAT', key, int(last_ms))
  end
end
