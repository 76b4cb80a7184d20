"Tests of 05a_work. Generated from nbs/05a_work.ipynb: edit that, then run pythia_book build."
import time
import torch
from hypothesis import given, settings, strategies as st
from pythia_nb import patterns as P
from pythia_nb.work import group_members, schedule_cases, torch_schedule, union_entries


def check_schedule(layout, plan, columns, group, chunk):
    "Assert all that a schedule promises, against the layout's own lists"
    codes = layout.codes().mT if columns else layout.codes()    # [heads, lists, blocks]
    n, (items, entries, splits, slots) = codes.shape[1], plan.counts.tolist()
    assert (plan.lists, plan.heads, plan.group) == (-(-n // group), layout.heads, group)
    assert items <= plan.max_items == len(plan.items) and splits <= plan.max_splits and slots <= plan.max_slots and entries <= layout.visible
    members = plan.members.view(layout.heads, -1)
    for row in members: assert sorted(row[row >= 0].tolist()) == list(range(n))
    if not columns or group == 1: assert all(row[row >= 0].tolist() == list(range(n)) for row in members)
    members, walked = members.reshape(-1, group).tolist(), plan.entries.tolist()
    stretches = [[] for _ in members]
    for at, start, end, slot in plan.items[:items].tolist(): stretches[at].append((start, end, slot))
    lengths, split_rows = (plan.items[:items, 2] - plan.items[:items, 1]), []
    assert (lengths.diff() <= 0).all() and (plan.items[items:, 0] == -1).all() and (plan.splits[splits:, 0] == -1).all()
    next_entry = next_slot = 0
    for at, parts in enumerate(stretches):
        parts.sort()
        assert parts[0][0] == next_entry and all(a[1] == b[0] for a, b in zip(parts, parts[1:])), "the parts cover the group's entries"
        next_entry = parts[-1][1]
        length, longest = parts[-1][1] - parts[0][0], max(end - start for start, end, _ in parts)
        assert len(parts) == max(-(-length // chunk), 1) and longest == -(-length // len(parts)) <= chunk
        if len(parts) == 1: assert parts[0][2] == -1
        else:
            assert [slot for *_, slot in parts] == list(range(next_slot, next_slot + len(parts)))
            split_rows.append([at, next_slot, len(parts), 0]); next_slot += len(parts)
        code = torch.stack([codes[at // plan.lists, x] if x >= 0 else torch.zeros(codes.shape[2], dtype=torch.int32) for x in members[at]])
        weight = torch.arange(group)[:, None]
        bits = ((code > 0).int() << weight | (code == 2).int() << (8 + weight)).sum(0)
        assert walked[parts[0][0]:next_entry] == [[j, bits[j].item()] for j in bits.nonzero().flatten().tolist()]
    assert next_entry == entries and next_slot == slots and plan.splits[:splits].tolist() == split_rows


arguments = schedule_cases(st)


@settings(max_examples=100, deadline=None)
@given(**arguments)
def test_schedules_keep_their_promises(layout, columns, group, chunk):
    check_schedule(layout, torch_schedule(layout, columns, group, chunk), columns, group, chunk)


def test_heavy_columns_stand_together():
    layout = P.per_head([P.strided(8) | P.local(1), P.local(3), P.sinks(2) | P.local(2)]).layout(64 * 32, block=32)
    members = torch_schedule(layout, True, 2, 16).members.view(3, 32, 2).tolist()
    assert members[0][:2] == [[0, 8], [16, 24]] and members[1] == [[2 * x, 2 * x + 1] for x in range(32)] and members[2][0] == [0, 1]
    apart = torch_schedule(layout, False, 2, 16).members.view(3, -1)
    assert all(row.tolist() == list(range(64)) for row in apart)
    strided = P.strided(8).layout(64 * 32, block=32)
    neighbours = union_entries(strided.col_ptr, strided.col_rows, strided.col_full, group_members(strided.col_ptr, 64, 2, False), 2, 64, 64)[1]
    assert torch_schedule(strided, True, 2, 16).counts[1] < 0.7 * neighbours.sum()    # the union of heavy columns is shared


def test_a_million_tokens_in_seconds():
    layout = P.bigbird().layout(1_048_576, block=64)
    start = time.perf_counter()
    for columns, group in [(False, 1), (True, 1), (False, 2), (True, 2)]:
        plan = torch_schedule(layout, columns, group, 64)
        items, entries, splits, _ = plan.counts.tolist()
        assert entries <= layout.visible and items >= plan.lists and (plan.items[:items, 2] - plan.items[:items, 1]).max() <= 64
        if columns: assert splits > 0
    assert time.perf_counter() - start < 10
