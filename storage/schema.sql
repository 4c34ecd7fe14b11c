-- The ledger of one partition (protocol, section 1). Written by one process through one connection.

create table domain (
    name              text primary key,   -- in normal form (engine/rules.py)
    delivered         integer not null,   -- absolute; never falls
    bounced           integer not null,
    first_at          integer not null,   -- unix seconds of the first event, 0 if its clock is not known
    last_delivered_at integer not null,   -- unix seconds, 0 for never
    last_bounced_at   integer not null,
    flush             integer not null,   -- the flush that wrote the row: what a push to MongoDB selects by
    chk               integer not null    -- crc32 of name, then delivered, bounced, flush
) strict, without rowid;

create table segment (
    name     text primary key,            -- of an event queue's file, without .seg
    consumed integer not null,            -- payload bytes that are in the counts
    clock    integer not null,            -- the second told by the last clock line below `consumed`
    finished integer not null             -- 1: nothing follows, and the file may be gone
) strict, without rowid;

create table id (                         -- of events and requests that are to count once (engine/ids.py)
    hash   blob primary key,              -- 16 bytes
    digest blob,                          -- of the request, 16 bytes, if this is an Idempotency-Key
    age    integer not null               -- meta.service_seconds when it came
) strict, without rowid;

create table meta (                       -- one row
    one           integer primary key check (one = 1),
    format        integer not null,
    uuid          text not null,          -- of this ledger file
    host          text not null,          -- of the data folder
    component     text not null,          -- the name under which MongoDB holds these counts
    partition     integer not null,
    partitions    integer not null,
    flush         integer not null,       -- number of the last flush
    pushed        integer not null,       -- MongoDB has every row with flush <= pushed
    threshold     integer not null,       -- the threshold that the tallies were made with
    catch_all     integer not null,       -- tallies: domains by status
    not_catch_all integer not null,
    unknown       integer not null,
    positions     integer not null,       -- xor of the checks of all rows of `segment`
    ids           integer not null,       -- xor of the checks of all rows of `id`
    service_seconds integer not null,     -- how long this partition was in service; ages of ids count in these
    chk           integer not null,       -- crc32 of all of this row but `one` and `opened`
    opened        integer not null        -- how often it was opened
) strict;
