"""What "drop-in" means, line by line, and the tests that hold each line; the README's table.

python -m tests.contract writes the table into the README; --check only compares.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

CONTRACT = {
    "signature": (
        "torch.optim's arguments and defaults, ours by keyword after; closures, hooks, "
        "`maximize`, `nesterov`, `dampening`, `amsgrad`; torch's own configurations",
        {
            "test_optim": [
                "test_signature_is_torchs_then_ours_by_keyword",
                "test_closures_hooks_and_version_counters",
            ],
            "test_optim_torch": ["test_lam_0_takes_torchs_steps"],
        },
    ),
    "lam = 0": (
        "torch.optim's result: on the reference its bits in float64, on kernels 1e-12 after "
        "100 steps, 3 ulp of float32 after one",
        {
            "test_optim": [
                "test_without_lam_float64_tracks_torch",
                "test_without_lam_random_problems_track_torch",
                "test_without_lam_one_step_is_the_float64_step",
            ],
        },
    ),
    "state_dict": (
        "torch's keys, both ways with torch.optim, older ones too; resumed to the bit; "
        "`weights_only=True`; float32 state stays so; `torch.distributed.checkpoint`",
        {
            "test_optim_checkpoints": [
                "test_checkpoints_go_both_ways",
                "test_save_and_load_with_weights_only_resumes_to_the_bit",
            ],
            "test_optim_torch": [
                "test_older_checkpoints_load_and_step_goes_on",
                "test_loading_keeps_the_states_precision",
                "test_distributed_checkpoints_read_and_write_its_state",
            ],
        },
    ),
    "schedulers": (
        "every one of torch's, with lr a float or a tensor; lam, mu and a by `LamScheduler`; "
        "no new plan, no new tiles",
        {
            "test_optim_torch": ["test_every_scheduler_leads_ours_as_torchs"],
            "test_schedulers": ["test_the_shapes", "test_a_checkpoint_resumes_to_the_bit"],
            "test_optim_batches": ["test_a_change_of_a_number_builds_no_new_plan"],
        },
    ),
    "lr, lam": (
        "float or 0-d tensor",
        {
            "test_optim": ["test_lr_and_lam_as_tensors"],
            "test_gpu_backends": ["test_numbers_on_the_device_are_read_by_each_step"],
        },
    ),
    "AMP": (
        "GradScaler; a step that it skips changes nothing, the first one too",
        {
            "test_optim": [
                "test_a_grad_scaler_scales_and_skips",
                "test_grad_scaler_skips_a_step_with_infinities_and_touches_nothing",
            ],
            "test_optim_torch": ["test_a_first_step_that_amp_skips_leaves_no_garbage"],
        },
    ),
    "capture": (
        "`capturable=True`: a CUDA graph replays the step (tested on an H200 at commit 420d8eb)",
        {
            "test_gpu_backends": [
                "test_capturable_keeps_the_counter_with_the_parameter_and_checkpoints_go_on",
            ],
            "test_gpu": ["test_a_graph_replays_with_lr_and_lam_as_they_then_are"],
        },
    ),
    "late gradients": (
        "parameters may begin, stop and come back; param groups may be added",
        {
            "test_optim": ["test_a_first_gradient_that_comes_late"],
            "test_optim_batches": ["test_batches_that_are_kept_follow_every_change"],
            "test_optim_torch": [
                "test_zero_grad_is_torchs_and_what_is_left_is_stepped_on_as_torch_does",
            ],
        },
    ),
    "memory format": (
        "any dense strides in place, gradients and state of others; non-dense is an error",
        {
            "test_optim": ["test_p_and_grad_of_different_strides"],
            "test_optim_torch": ["test_gradients_and_state_in_another_layout_than_the_weight"],
            "test_optim_errors": ["test_bad_parameters_are_refused_at_construction"],
        },
    ),
    "dtypes": (
        "float32, float64, bfloat16, float16; float32 masters or stochastic rounding",
        {
            "test_optim_torch": ["test_a_mixture_of_dtypes_and_sizes_in_one_step"],
            "test_master_weights": [
                "test_the_master_is_what_a_float32_weight_becomes",
                "test_small_steps_add_up",
            ],
            "test_stochastic_rounding": [
                "test_stochastic_rounding_keeps_small_steps_on_average_and_repeats",
                "test_a_step_rounds_as_the_references_but_where_float32_decides",
            ],
        },
    ),
    "copies": (
        "`copy.deepcopy`, pickle, subclasses, printing",
        {
            "test_optim_checkpoints": ["test_pickle_and_deepcopy"],
            "test_optim_torch": ["test_copies_pickles_and_prints"],
            "test_optim": ["test_the_optimizers_can_be_subclassed"],
        },
    ),
    "autograd": (
        "`_version` goes up; what needs the old value raises",
        {"test_optim": ["test_autograd_knows_what_a_step_has_written"]},
    ),
    "torch.compile": (
        "a step is one op, and a prox: no graph break, no recompilation by a schedule; `opcheck`",
        {
            "test_compile": [
                "test_a_step_has_no_graph_break_and_no_schedule_recompiles_it",
                "test_a_training_step_with_a_scheduler_is_not_recompiled_after_warm_up",
                "test_a_prox_is_one_op_and_no_step_size_recompiles_it",
                "test_the_op_passes_opcheck",
            ],
        },
    ),
    "errors": (
        "name the argument, its value and what is allowed; nothing is changed",
        {
            "test_optim_errors": [
                "test_bad_options_at_construction_in_a_group_and_between_steps",
                "test_bad_gradients_change_nothing_not_even_the_good_tensors",
                "test_a_complex_gradient_is_refused_and_nothing_is_changed",
                "test_a_number_on_the_wrong_device_is_named_and_nothing_is_changed",
                "test_gradients_and_state_that_do_not_fit_change_nothing",
                "test_a_step_that_a_backend_refuses_leaves_no_trace",
            ],
            "test_optim_torch": ["test_torchs_error_inputs_are_refused_with_torchs_words"],
        },
    ),
    "zero": (
        "a dead weight is +0.0; no NaN from a dead group, at lr = 0 too",
        {
            "test_optim": [
                "test_training_leaves_plus_zeros",
                "test_a_dead_group_stays_plus_zero_and_is_never_nan",
            ],
            "test_prox": ["test_dead_weights_are_plus_zero"],
        },
    ),
    "determinism": (
        "the same bits, run after run, for any number of threads",
        {"test_optim": ["test_the_same_bits_run_after_run_for_any_number_of_threads"]},
    ),
    "memory": (
        "kernels need the groups' sums, threads a workspace; the reference, float64 temporaries",
        {"test_native": ["test_a_step_needs_no_memory_beyond_the_groups"]},
    ),
    "sharding": (
        "`ZeroRedundancyOptimizer`; `fully_shard`, by the reference",
        {"test_distributed": ["test_on_two_ranks"]},
    ),
    "clients": (
        "Lightning, Accelerate, transformers, TensorBoard",
        {
            "test_clients": [
                "test_lightning_resumes_to_the_bit_and_leaves_zeros",
                "test_accelerate_resumes_to_the_bit_and_leaves_zeros",
                "test_transformers_resumes_to_the_bit_and_leaves_zeros",
                "test_tensorboard_reads_back_lam_sparsity_and_the_penalty",
            ],
        },
    ),
}


def table():
    """Return the README's table."""
    lines = ["| | holds | tests in |", "|---|---|---|"]
    for line, (holds, tests) in CONTRACT.items():
        links = ", ".join(f"[`{module}`](tests/{module}.py)" for module in tests)
        lines.append(f"| {line} | {holds} | {links} |")
    return "\n".join(lines)


def missing():
    """Return the tests that the contract names and that are not there."""
    return [
        f"{module}::{test}"
        for _, tests in CONTRACT.values()
        for module, names in tests.items()
        for test in set(names) - functions(ROOT / "tests" / f"{module}.py")
    ]


def functions(path):
    """Return the names of a file's functions."""
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def rendered(readme):
    """Return the README with the table between its marks."""
    first, last = "<!-- contract -->\n", "\n<!-- /contract -->"
    head, rest = readme.split(first)
    return head + first + table() + last + rest.split(last)[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    new = rendered(path.read_text())
    if "--check" in sys.argv:
        sys.exit(new != path.read_text() and "README.md: run python -m tests.contract")
    path.write_text(new)
