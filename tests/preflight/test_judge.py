"""What the check says of measurements that are made up: whose fault it is, and whose it is not."""

from __future__ import annotations

import dataclasses

from megadiff.preflight.judge import PreflightConfig, Report, Verdict, clock_offsets, compare, findings

CONFIG = PreflightConfig()


def cluster() -> list[Report]:
    """Four nodes of two ranks; the second rank of each is a little slower."""
    return [
        Report(
            host=f"gpu{rank // 2}",
            facts={"torch": "2.13.0", "NCCL": "2.27.5"},
            measured={"matrix products": 700.0 - rank % 2, "all-reduce, node": 380.0, "writing": 2.0},
            times_of_day=[1000.0, 1001.0],
        )
        for rank in range(8)
    ]


def with_rank(rank: int, **changes: object) -> list[Report]:
    reports = cluster()
    reports[rank] = dataclasses.replace(reports[rank], **changes)  # type: ignore[arg-type]
    return reports


def test_nothing_is_wrong_with_equal_nodes_and_the_slowest_is_still_named() -> None:
    assert list(findings(cluster(), CONFIG)) == []
    text = str(Verdict.of(cluster(), CONFIG))
    assert "slowest: node gpu0, rank 1: matrix products 699 TFLOP/s, 1.00 of the median 699.5" in text
    assert text.endswith("nothing is wrong") and "8 rank(s) on 4 node(s)" in text


def test_a_slow_rank_is_named_with_its_node() -> None:
    reports = with_rank(5, measured={"matrix products": 560.0, "all-reduce, node": 310.0, "writing": 1.1})
    # 560 is below 0.9 of the median; 310 and 1.1 are above 0.8 and 0.5.
    [sentence] = findings(reports, CONFIG)
    assert sentence == (
        "node gpu2, rank 5: matrix products 560 TFLOP/s, 0.80 of the median 699.5, but must be at least 0.9: repair "
        "it, or leave it out"
    )
    assert "slowest: node gpu2, rank 5: writing 1.1 GB/s, 0.55 of the median 2" in str(Verdict.of(reports, CONFIG))


def test_thresholds_are_those_of_the_measurement() -> None:
    for name, value, unit in (
        ("GPU clock", 1781.0, "MHz"),
        ("all-gather, job", 1583.0, "GB/s"),
        ("writing", 989.0, "GB/s"),
    ):
        reports = [dataclasses.replace(report, measured={name: 1980.0}) for report in cluster()]
        reports[7] = dataclasses.replace(reports[7], measured={name: value})
        [sentence] = findings(reports, CONFIG)
        assert sentence.startswith(f"node gpu3, rank 7: {name} {value:g} {unit}, ")
        reports[7] = dataclasses.replace(reports[7], measured={name: value + 2})
        assert not list(findings(reports, CONFIG))


def test_gpus_that_are_all_slow_are_held_to_their_peak() -> None:
    """Equal to their median, and still wrong: 0.6 of 989.4 TFLOP/s is 593.6."""
    facts = {"GPU": "NVIDIA H100 80GB HBM3"}
    capped = [dataclasses.replace(one, facts=facts, measured={"matrix products": 590.0 + rank})
              for rank, one in enumerate(cluster())]  # fmt: skip
    [sentence] = findings(capped, CONFIG)
    assert sentence == (
        "matrix products 590 TFLOP/s on rank 0, and too slow on 2 node(s): gpu0, gpu1, but must be at least 593.6 (0.6 "
        "of the peak of NVIDIA H100 80GB HBM3): look for limits of power and heat (nvidia-smi -q -d PERFORMANCE)"
    )
    assert not list(findings(capped, PreflightConfig(min_share_of_peak=0.0)))
    unknown = [dataclasses.replace(one, facts={"GPU": "a toaster"}) for one in capped]
    assert not list(findings(unknown, CONFIG))


def test_floors_of_bandwidth_are_those_of_their_scope() -> None:
    """By default there are none: what links there are is not known here."""
    names = {
        "all-reduce, node": "min_node_gb_per_s",
        "all-gather, pairs of nodes": "min_pair_gb_per_s",
        "all-reduce, job": "min_job_gb_per_s",
        "sending, pairs of nodes": "min_sending_gb_per_s",
    }
    slow = [dataclasses.replace(one, measured=dict.fromkeys(names, 3.0)) for one in cluster()]
    assert not list(findings(slow, CONFIG))
    for name, setting in names.items():
        [sentence] = findings(slow, PreflightConfig(**{setting: 40.0}))  # type: ignore[arg-type]
        assert sentence == (
            f"{name} 3 GB/s on rank 0, and too slow on 4 node(s): gpu0, gpu1, gpu2, gpu3, but must be at least 40: "
            "look which links NCCL has found (NCCL_DEBUG=INFO) and whether they are up"
        )
        assert not list(findings(slow, PreflightConfig(**{setting: 3.0})))  # type: ignore[arg-type]


def test_one_node_is_compared_rank_by_rank() -> None:
    reports = [dataclasses.replace(report, host="gpu0") for report in cluster()]
    reports[3] = dataclasses.replace(reports[3], measured={"matrix products": 350.0})
    [sentence] = findings(reports, CONFIG)
    assert sentence.startswith("node gpu0, rank 3: matrix products 350 TFLOP/s, 0.50 of the median 69")
    assert {one.host for one in compare(reports)} == {"gpu0"}


def test_versions_that_differ_are_said_once_with_all_their_nodes() -> None:
    reports = with_rank(2, facts={"torch": "2.12.0", "NCCL": "2.27.5"})
    reports[7] = dataclasses.replace(reports[7], facts={"torch": "2.12.0", "NCCL": "2.27.5", "NCCL_DEBUG": "INFO"})
    assert list(findings(reports, CONFIG)) == [
        "torch is 2.12.0 on gpu1, gpu3, but 2.13.0 elsewhere: make them the same",
        "NCCL_DEBUG is INFO on gpu3, but not there elsewhere: make them the same",
    ]


def test_a_wrong_clock_is_told_from_a_late_rank() -> None:
    late = with_rank(4, times_of_day=[1030.0, 1001.0])
    assert not list(findings(late, CONFIG))
    reports = with_rank(4, times_of_day=[1030.0, 1031.5])
    reports[5] = dataclasses.replace(reports[5], times_of_day=[1030.0, 1031.0])
    assert clock_offsets(reports) == {"gpu0": 0, "gpu1": 0, "gpu2": 30.0, "gpu3": 0}
    [sentence] = findings(reports, CONFIG)
    assert sentence.startswith("node gpu2: its time of day is +30.0 s off, but must be within 2 s: synchronise it")


def test_problems_come_first() -> None:
    reports = with_rank(1, problems=["cannot write"], measured={})
    assert list(findings(reports, CONFIG)) == ["rank 1 on gpu0: cannot write"]
