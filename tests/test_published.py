"""The planner against what others have published: step times, memory, GPU-hours, parameters."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from conftest import slow
from fit_rates import (
    FITTED,
    OUTLIERS,
    PUBLISHED,
    best_efficiency,
    fitted,
    gpu_of,
    left_out_errors,
    log_ratios,
    model_of,
    of_group,
    read_published,
    setup_of,
    table_of_groups,
)
from perf import cost, memory
from perf.hardware import EAGER

ROWS = read_published()


def all_rows():
    with open(PUBLISHED, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_parameters_are_those_of_every_row_of_llm_foundry():
    """Which all have learned positions and biases, and whose counts come from its own code."""
    rows = [row for row in all_rows() if row["group"] == "llm-foundry" and row["n_params"]]
    assert len(rows) >= 213
    for row in rows:
        assert cost.num_params(model_of(row)) == int(row["n_params"]), row["id"]


@pytest.mark.parametrize("gpu", ["h100-sxm", *slow("a100-80", "a100-40")])
def test_model_sizes_that_the_fit_has_not_seen_are_predicted(gpu):
    errors = abs(left_out_errors(of_group(ROWS, "llm-foundry", gpus=[gpu])))
    print(f"{gpu}, sizes left out: median {np.median(errors):.1%}, 90th percentile {np.quantile(errors, 0.9):.1%}")
    assert np.median(errors) < 0.08 and np.quantile(errors, 0.9) < 0.15


@pytest.mark.parametrize("family", FITTED)
def test_rates_are_those_of_the_fit(family):
    found, kept = fitted(of_group(ROWS, "llm-foundry", gpus=FITTED[family])), EAGER[family]
    for name in ("matmul", "attention", "memory"):
        assert getattr(kept, name) == pytest.approx(getattr(found, name), rel=0.02)


@pytest.mark.slow
def test_one_efficiency_describes_each_other_code():
    print("", *table_of_groups(ROWS), sep="\n")
    for group in sorted({row["group"] for row, _ in ROWS} - {"llm-foundry"}):
        rows = [r for r in of_group(ROWS, group) if r[0]["id"] not in OUTLIERS]
        rows = [r for r in rows if r[0]["step_s"]] or rows
        errors = np.expm1(log_ratios(rows, efficiency=best_efficiency(rows)))
        assert abs(errors).max() < 0.25, group


def bytes_of(row, **changes):
    s = replace(setup_of(row), **changes)
    s = replace(s, checkpointing={"op": "selective"}.get(s.checkpointing, s.checkpointing))
    return sum(memory.memory(model_of(row), s).values())


def test_what_was_published_to_run_fits():
    """Of llm-foundry, whose loss is fused: micro-batches that ran fit, twice as large ones do not.

    They are the largest that ran, but not all the largest that would have.
    """
    fits = {1: [], 2: []}
    for row, _ in of_group(ROWS, "llm-foundry"):
        for larger in fits:
            n_bytes = bytes_of(row, logits_bytes=6, micro_batch_size=larger * int(row["micro_batch_size"]))
            fits[larger].append(1.05 * n_bytes / 2**30 + 1 <= gpu_of(row).usable_memory_gib)
    assert np.mean(fits[1]) > 0.95 and np.mean(fits[2]) < 0.25


def test_memory_is_that_which_was_published():
    """As allocated, or, torchtitan's, as reserved; with what each code keeps of a parameter and a logit."""
    recipes = {  # the first's 8 bytes a logit and float32 sums of gradients were chosen to fit its rows
        "kempnerforge": {"weight_bytes": 2, "optimizer_bytes": 4, "logits_bytes": 8, "accumulate": "whole"},
        "torchtitan": {"logits_bytes": 8},
        "nanotron": {"weight_bytes": 2, "optimizer_bytes": 12 / 16, "logits_bytes": 8},
    }
    rows = [row for row, _ in ROWS if row["memory_gib"]]
    assert len(rows) == 15
    for row in rows:
        predicted = bytes_of(row, **{"gradient_bytes": 4, **recipes[row["group"]]}) / 2**30
        published = float(row["memory_gib"])
        print(f"{row['id']:<6}{row['group']:<14}{predicted:7.1f} GiB predicted, {published:6.1f} published")
        assert predicted == pytest.approx(published, rel=0.1), row["id"]


def test_gpu_hours_are_those_which_were_published():
    """Of whole trainings: with a code's one efficiency, as the planner's availability stands for stops and restarts."""
    for group in ("fms-fsdp", "llama-1", "llama-2"):
        rows = [r for r in of_group(ROWS, group) if r[0]["gpu_hours"]]
        errors = np.expm1(log_ratios(rows, efficiency=best_efficiency(rows)))
        assert abs(errors).max() < 0.2
