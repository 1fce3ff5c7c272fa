"""Lua scripts: each runs in Redis as one step, so that a change and its announcement are never apart."""

from collections.abc import Iterable

from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.placement.keys import Keys

_CATALOG_COMMON = """
local function stored(name)
  local json = redis.call('HGET', KEYS[1], name)
  local ok, record = pcall(cjson.decode, json or '')
  -- What is no record of ours counts as absent.
  if ok and type(record) == 'table' and record.name == name then return record, json end
end
local function announce(channel, new_epoch, version, jsons)
  redis.call('HSETNX', KEYS[2], 'epoch', new_epoch)
  redis.call('HSET', KEYS[2], 'version', version)
  local seq = redis.call('HINCRBY', KEYS[2], 'seq', 1)
  local epoch = redis.call('HGET', KEYS[2], 'epoch')
  redis.call('PUBLISH', channel, cjson.encode({kind = 'catalog', epoch = epoch, seq = seq, records = jsons}))
end
local version = tonumber(redis.call('HGET', KEYS[2], 'version') or 0)
"""

WRITE_CATALOG = (
    _CATALOG_COMMON
    + """
-- KEYS: catalog, catalog head.
-- ARGV: channel, epoch if there is none, mode, name, record ('' to remove), highest version the caller has seen,
--       '1' to write even if the store is behind that.
-- Returns {outcome, record}. cjson writes numbers with 14 digits: more than any size or version here has.
local mode, name, seen = ARGV[3], ARGV[4], tonumber(ARGV[6])
if version < seen and ARGV[7] ~= '1' then return {'behind', ''} end
local old, old_json = stored(name)
local live = old and not old.deleted
local was_refused = old and type(old.refusal) == 'table'
local record
if mode == 'remove' or mode == 'withdraw' then
  if not live and not (mode == 'withdraw' and was_refused) then return {'unknown', ''} end
  if mode == 'withdraw' and old.origin ~= 'config' then return {'kept', old_json} end
  record = old
  record.deleted = true
  record.refusal = nil
  -- A tombstone of origin config is no operator's word: what was withdrawn may come back.
  if mode == 'remove' then record.origin = 'runtime' end
else
  record = cjson.decode(ARGV[5])
  if mode == 'add' and live then return {'conflict', old_json} end
  if mode == 'config' and old then
    local same = old.digest == record.digest and old.uri == record.uri and old.checked == record.checked
    if old.origin ~= 'config' or (same and live) then return {'kept', old_json} end
  end
  if mode == 'refuse' and old then
    -- What is served goes only when just that is refused for good.
    local serves_on = live and not (record.refusal.is_permanent and old.digest == record.digest)
    local same = was_refused and old.refusal.reason == record.refusal.reason and old.fingerprint == record.fingerprint
      and old.checked == record.checked
    if old.origin ~= 'config' or serves_on or same then return {'kept', old_json} end
  end
end
record.version = math.max(version, seen, old and tonumber(old.version) or 0) + 1
local json = cjson.encode(record)
redis.call('HSET', KEYS[1], name, json)
announce(ARGV[1], ARGV[2], record.version, {json})
return {'written', json}
"""
)

RESTORE_CATALOG = (
    _CATALOG_COMMON
    + """
-- KEYS: catalog, catalog head. ARGV: channel, epoch if there is none, records. Returns how many were taken.
local taken = {}
for i = 3, #ARGV do
  local record = cjson.decode(ARGV[i])
  local old = stored(record.name)
  if not old or (tonumber(old.version) or 0) < record.version then
    redis.call('HSET', KEYS[1], record.name, ARGV[i])
    version = math.max(version, record.version)
    taken[#taken + 1] = ARGV[i]
  end
end
if #taken > 0 then announce(ARGV[1], ARGV[2], version, taken) end
return #taken
"""
)

PUBLISH_REPLICA = """
-- KEYS: heartbeat, tiers, replicas.
-- ARGV: channel, message, replica id, TTL in ms, beat, the beat that must be there ('' to write everything anew),
--       how many tiers must be there, {digest: tier} as JSON (one text: far cheaper for clients than 10,000 words).
-- Returns 0, nothing done, when Redis does not hold what this report builds on; else 1.
if ARGV[6] == '' then
  redis.call('DEL', KEYS[2])
elseif redis.call('GET', KEYS[1]) ~= ARGV[6] or redis.call('HLEN', KEYS[2]) ~= tonumber(ARGV[7]) then
  return 0
end
for digest, tier in pairs(cjson.decode(ARGV[8])) do
  if tier == 0 then
    redis.call('HDEL', KEYS[2], digest)
  else
    redis.call('HSET', KEYS[2], digest, tier)
  end
end
redis.call('SET', KEYS[1], ARGV[5], 'PX', ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
redis.call('SADD', KEYS[3], ARGV[3])
redis.call('PUBLISH', ARGV[1], ARGV[2])
return 1
"""

READ_REPLICA = """
-- KEYS: heartbeat, tiers. Returns {beat, digest and tier by turns as one JSON list}, or nothing when expired.
local beat = redis.call('GET', KEYS[1])
if beat then return {beat, cjson.encode(redis.call('HGETALL', KEYS[2]))} end
"""

WITHDRAW_REPLICA = """
-- KEYS: heartbeat, tiers, replicas. ARGV: channel, message, replica id.
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('SREM', KEYS[3], ARGV[3])
redis.call('PUBLISH', ARGV[1], ARGV[2])
return 1
"""

COUNT_USES = """
-- KEYS: popularity, its total. ARGV: {digest: uses} as JSON, the total at which all counts are halved, most members.
local total = tonumber(redis.call('GET', KEYS[2]) or 0)
for digest, uses in pairs(cjson.decode(ARGV[1])) do
  redis.call('ZINCRBY', KEYS[1], uses, digest)
  total = total + uses
end
while total >= tonumber(ARGV[2]) do
  redis.call('ZUNIONSTORE', KEYS[1], 1, KEYS[1], 'WEIGHTS', 0.5)
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(0.5')
  total = total / 2
end
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -tonumber(ARGV[3]) - 1)
redis.call('SET', KEYS[2], total)
return 1
"""

RESTORE_CHUNK = 256
"""Records per RESTORE_CATALOG call: Redis does nothing else meanwhile."""


def restore_arguments(keys: Keys, new_epoch: str, records: Iterable[AdapterRecord]) -> list[str]:
    """ARGV of RESTORE_CATALOG."""
    return [keys.changes, new_epoch, *(record.model_dump_json() for record in records)]
