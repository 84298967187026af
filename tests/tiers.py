"""Which tests are slow: ``make test`` leaves them out, ``make test-slow`` runs them, CI runs a sixth of them.

Of each kind of check some case stays in ``make test``. A test is found here by the name of its function.
"""

import zlib

PARTS = 6

NONE: tuple[str, ...] = ()
SLOW: dict[str, tuple[str, ...]] = {
    # Several learners: each kind that leads, and a replay of a daemon's run.
    "test_a_mixture_of_normal_distributions_says_how_sure_it_is_and_keeps_its_bits": NONE,
    "test_any_learner_that_leads_rolls_back_and_halves_its_rate": ("moml",),
    "test_a_replay_and_a_restart_keep_the_learners": NONE,
    "test_a_run_of_beliefs_continues_with_the_same_bits": ("attentive neural process",),
    "test_a_run_that_is_stopped_and_killed_gives_the_same_bits": ("BMAML, chaser",),
    # A race between settings.
    "test_a_kill_in_a_race_changes_no_decision_and_no_bit": ("56",),
    "test_a_kill_before_a_decision_takes_effect_changes_nothing": NONE,
    "test_ranks_and_a_replay_obey_a_race_whatever_is_killed": NONE,
    "test_a_fork_begins_with_what_the_race_has_left": ("80-names1",),
    "test_what_is_served_is_what_is_scored_after_a_race": ("True",),
    "test_a_search_in_two_parts_tries_the_same": NONE,
    # Several inputs, weights and targets of any shape: the rounds that stay play without a daemon.
    "test_a_model_with_two_inputs_is_served_restarted_and_replayed": NONE,
    "test_two_ranks_learn_the_same_bits_of_named_inputs_and_weights": NONE,
    "test_a_comparator_of_named_inputs_and_weights_is_that_of_one_tensor": ("closed_form",),
    "test_check_accepts_targets": ("segmentation", "several labels"),
    "test_a_sample_of_weight_0_is_a_sample_that_is_left_out": ("exact",),
    # The table of texts.
    "test_a_frozen_encoder_tells_sections_apart": NONE,
    # The crash walk, power losses: every scenario.
    "test_nothing_acknowledged_is_lost_or_duplicated": ("keep-0", "letters-0", "random-0-1-0", "table-jsonl-0"),
    "test_a_second_fault_at_the_next_start_loses_nothing": ("letters", "move"),
    "test_a_power_loss_loses_nothing_acknowledged": ("seal",),
    "test_missing_syncs_are_detected": ("ingest-data", "seal-data"),
    # Padding, draws of samples, and models that return objects: every kind.
    "test_auto_compares_padded_tasks_with_the_loop_over_tasks_as_they_are": NONE,
    "test_sequences_with_a_mask_are_padded_too": ("Classifier-False",),
    "test_padded_plans_are_recorded_and_a_replay_pads_alike_whatever_its_settings_say": NONE,
    "test_samples_of_weight_0_do_not_count": ("dp_mixture", "from_scratch", "ftml"),
    "test_a_run_that_draws_samples_continues_with_the_same_bits": ("5",),
    "test_every_number_of_ranks_draws_the_same_samples": ("2",),
    "test_the_meta_gradient_is_that_of_the_model_that_returns_the_tensor": ("an object", "a dict in a tuple"),
    # Frozen weights in a file: one process stays.
    "test_two_ranks_learn_the_same_bits_and_hold_a_layer_each": NONE,
    # Kills of every process, in every way of sharing updates.
    "test_kill_every_process_at_random_moments": ("8",),
    "test_branches_survive_a_kill_around_a_promotion_and_are_replayed_bit_for_bit": NONE,
    "test_ingest_continues_while_the_trainer_is_dead": NONE,
    "test_sigterm_drains_and_the_next_daemon_continues": NONE,
    "test_a_killed_maintenance_process_loses_nothing_and_is_restarted": NONE,
    "test_each_source_resumes_at_its_position_after_a_kill": NONE,
    "test_segmenting_uses_the_current_leader_and_a_kill_loses_no_row": NONE,
    "test_kills_at_random_moments_lose_no_acknowledged_round": NONE,
    "test_kills_at_named_points_change_no_round_and_no_statistics": ("jsonl",),
    "test_a_run_killed_repeatedly_ends_where_its_replay_ends": ("2",),
    "test_a_run_killed_repeatedly_gives_the_same_bits_under_retention": NONE,
    # Settings of baselines: each one.
    "test_a_baseline_has_options_of_its_own": ("steps",),
    "test_the_optimizer_of_meta_changes_no_baseline": ("meta0",),
    "test_a_killed_compaction_is_resumed": ("0",),
    "test_a_kill_around_a_commit_loses_and_duplicates_nothing": ("kafka-after", "nats-before", "redis-before"),
    "test_an_erasure_that_is_killed_is_completed_by_the_next_start": ("ledger",),
    "test_an_erasure_that_is_killed_in_any_step_is_completed": ("27",),
    # An entity that is forgotten.
    "test_a_daemon_learns_again_without_the_entity_and_a_replay_is_of_the_new_epoch": NONE,
    "test_nothing_of_the_entity_is_left_and_the_race_the_rollback_and_the_fork_go_on": NONE,
    "test_a_replay_follows_the_decisions_and_says_from_which_epoch": NONE,
    "test_checkpoints_that_alone_are_restored_are_recognised": NONE,
    "test_the_learners_are_those_of_a_run_in_which_the_rounds_were_quarantined": ("single",),
    "test_rounds_that_retention_has_removed_are_quarantined_where_they_would_be_learned_again": NONE,
    # Labels that come after a kill.
    "test_labels_that_come_later_are_scored_by_the_stored_answer": NONE,
    # Ranks and machines.
    "test_the_run_recovers_by_itself_with_the_same_bits": NONE,
    "test_a_rank_fault_at_any_point_changes_no_bit": NONE,
    "test_a_machine_can_join_die_and_rejoin": NONE,
    "test_a_run_without_ranks_listens_at_its_own_addresses_only": NONE,
    "test_ranks_on_one_machine_listen_on_loopback_for_one_another_only": NONE,
    "test_several_machines_listen_at_the_addresses_that_join_them_only": NONE,
    "test_any_number_of_ranks_at_any_stage_continues_a_run": NONE,
    "test_a_stopping_run_exits_with_70_and_loses_nothing_acknowledged": NONE,
    "test_a_diverged_run_rolls_back_and_continues": NONE,
    "test_deterministic_ranks_learn_the_same_bits_for_any_number_of_ranks": NONE,
    "test_deterministic_ranks_that_follow_recorded_programs_learn_the_same_bits": NONE,
    "test_a_hanging_rank_does_not_block_the_others": ("2",),
    "test_the_optimizer_state_can_be_offloaded_to_host_memory_and_resumed": NONE,
    "test_any_number_of_ranks_at_any_stage_loads_the_state_of_another": NONE,
    # Compiled programs: what a compiler takes is a minute each.
    "test_a_compiled_program_is_used_once_it_is_ready": NONE,
    "test_compiled_programs_are_right_and_give_the_same_bits_when_reloaded": NONE,
    "test_a_digest_identifies_a_program_in_every_process": NONE,
    "test_a_failing_compiler_is_reported_and_work_continues": NONE,
    "test_a_program_with_constants_is_compiled": NONE,
    "test_compiled_second_derivatives_of_batch_normalisation_are_right": NONE,
    "test_a_program_that_draws_by_key_is_compiled": NONE,
    "test_a_program_is_recorded_as_make_fx_records_it": ("mlp_tanh", "layer_norm"),
    "test_plans_in_chunks_are_benchmarked_in_chunks": NONE,
    "test_a_program_computes_repeated_work_once": NONE,
    "test_a_run_that_changed_its_plans_replays_bit_for_bit": NONE,
    # Comparisons that are killed, and replays that fail in their own process.
    "test_a_killed_comparison_continues_to_the_same_bits": NONE,
    "test_a_killed_replay_fails_alone": NONE,
    "test_modules_next_to_two_configurations_may_have_one_name": NONE,
    "test_each_stream_has_a_pool_of_learners_that_can_be_built": ("moml", "drifting"),
    "test_the_rows_of_a_stream": NONE,
    "test_the_first_table_is_made_of_replays": NONE,
    "test_a_failing_or_changed_configuration_costs_the_others_nothing": NONE,
    "test_the_answer_that_is_compared_is_that_of_the_configuration": NONE,
    # Daemons over a long run.
    "test_the_demo_writes_its_files": NONE,
    "test_an_interrupted_demo_leaves_a_complete_run": NONE,
    "test_whatever_ends_the_demo_drains_its_daemon": ("SIGTERM",),
    "test_a_hangup_drains": NONE,
    "test_a_closing_terminal_drains": ("text",),
    "test_a_run_that_compiles_drains": NONE,
    "test_one_deadline_holds_for_everything": NONE,
    "test_further_signals_do_not_interrupt_a_drain": NONE,
    "test_a_full_disk_loses_nothing_acknowledged": NONE,
    "test_dead_comparators_turn_their_check": NONE,
    "test_a_task_that_ends_the_trainer_turns_restarts_until_it_is_in_quarantine": NONE,
    "test_a_full_disk_turns_its_check": NONE,
    "test_a_hanging_trainer_is_killed_and_restarted": NONE,
    "test_a_broker_that_is_gone_turns_the_check_of_its_source": NONE,
    "test_an_archive_that_is_gone_turns_its_check": NONE,
    "test_no_long_search_is_far_below_a_settled_comparator": NONE,
    "test_a_killed_and_a_stopped_rank_turn_the_check_of_the_trainer": NONE,
    "test_a_run_that_diverges_turns_its_check": NONE,
    "test_a_real_broker_that_is_gone_turns_the_check_of_its_source": NONE,
    "test_a_run_that_diverges_turns_the_check_and_good_rounds_turn_it_back": NONE,
    "test_the_pill_and_the_pace_follow_the_health": ("stalled", "diverged"),
    "test_a_run_can_change_its_log_format_between_starts": NONE,
    "test_a_run_reports_how_many_points_its_tasks_needed": NONE,
    "test_status_regret_and_metrics_agree": NONE,
    "test_a_daemon_seals_into_an_object_store_and_learns_from_there": NONE,
    "test_a_replay_of_discarded_rounds_is_refused": NONE,
    "test_the_recorded_loss_is_that_of_the_answer_that_was_served": ("gaussian_mixture-dp_mixture", "gaussian-ftml@1"),
    "test_a_temporary_failure_of_network_or_broker_loses_and_duplicates_nothing": (
        "kafka-cut",
        "nats-kill",
        "redis-swallow",
    ),
    "test_sealing_waits_for_an_unreachable_object_store": NONE,
    "test_the_ledger_evicts_only_what_it_must_and_its_file_shrinks": NONE,
    # Memory: every kind of model and of gradient.
    "test_task_sizes_are_read_from_the_history": NONE,
    "test_stacked_tasks_add_their_individual_memory": NONE,
    "test_estimating_a_peak_allocates_nothing": NONE,
    "test_dropout_and_data_dependent_losses_are_estimated_too": ("recomputed",),
    "test_rematerialisation_needs_memory_of_the_order_of_the_root_of_the_steps": ("rule0-1",),
    "test_rematerialisation_changes_no_bit": ("meta_sgd", "momentum", "sgd"),
    # Models that are refused, or accepted, with the layer's name: every kind.
    "test_a_declared_surrogate_is_accepted_under_every_estimator": (
        "straight-through-exact",
        "a function that is differentiated once-first_order",
        "inside another layer-reptile",
    ),
    "test_such_models_adapt_like_plain_autograd_and_have_no_problem": ("a float64 buffer", "a frozen bfloat16 body"),
    "test_the_meta_gradient_over_tasks_is_that_of_the_unrolled_loop": ("loop-inference_mode", "vmap-inference_mode"),
    "test_stacked_tasks_are_not_broadcast_either": ("loop", "vmap"),
    "test_every_learner_plays_the_same_game_in_inference_mode": ("aruba", "c_maml", "ftml", "moml"),
    "test_a_compiled_model_counts_as_the_module_that_it_was_made_from": NONE,
    "test_a_declared_surrogate_gradient_is_accepted_in_a_configuration": ("exact",),
    # Statistics over many draws, minima that are searched for.
    "test_all_intervals_of_a_run_contain_the_mean_at_once": ("drift",),
    "test_one_sided_differences_are_missed_as_often_as_documented": NONE,
    "test_full_batches_reach_the_minimum": NONE,
    "test_900_steps_of_adam_find_no_much_lower_loss_on_sinusoids": NONE,
    "test_the_estimate_approaches_each_tasks_own_minimum_from_above": NONE,
    "test_the_estimate_approaches_the_minimum_from_above": NONE,
    "test_the_comparator_is_trained_until_its_loss_stops_falling": NONE,
    "test_the_standard_error_of_a_sampled_evaluation_covers_the_truth": ("40-20",),
    "test_the_expected_step_is_that_of_the_mean_over_all_rounds": ("all", "reservoir", "stratified", "uniform"),
    "test_the_seed_decides_the_stream": ("drifting_sinusoids", "heavy_tailed_functions", "sinusoid"),
    "test_made_tasks_are_what_the_spec_says": ("drifting_sinusoids", "heavy_tailed_functions", "sinusoid"),
    # Experiments and benchmarks.
    "test_rows_are_evaluated_on_held_out_scripts_saved_and_rendered": NONE,
    "test_a_run_is_scored_after_the_warm_up_and_saved": ("online Reptile",),
    "test_a_leader_is_trained_as_from_scratch_trains_random_weights": NONE,
    "test_images_are_shuffled_and_support_and_query_are_disjoint": NONE,
    "test_learning_lowers_the_loss_on_fresh_tasks": NONE,
    "test_rows_are_computed_saved_and_rendered": NONE,
    "test_the_loss_of_a_trained_leader_is_used_as_likelihood": NONE,
    "test_the_command_writes_its_table_and_reuses_finished_parts": NONE,
    "test_every_method_is_measured_and_rendered": NONE,
    "test_a_race_returns_correct_rows_and_names_failed_contestants": ("sinusoid",),
    "test_every_recipe_is_found_by_the_contract_tests_and_passes": NONE,
    "test_a_failure_on_one_rank_quarantines_the_round_on_all": NONE,
    "test_a_task_that_ends_the_trainer_twice_is_quarantined": NONE,
    "test_the_fault_is_fixed": ("01_poison_task_stops_the_run",),
    "test_the_tutorial_runs_as_written": NONE,
    "test_a_notebook_runs_as_written": NONE,
    "test_a_table_of_texts_feeds_a_frozen_encoder": NONE,
    "test_the_parts_hold_every_slow_test_once": NONE,
    # Several seeds, widths and problems of one kind.
    "test_on_a_quadratic_the_implicit_gradient_is_that_of_the_closed_form": ("0",),
    "test_more_steps_bring_the_implicit_and_the_unrolled_gradient_together": ("mlp_tanh-fast1",),
    "test_the_other_rank_waits_for_a_slow_rank_without_working_longer": NONE,
}
"""The slow tests, and their cases that are not."""

SLOW_PREFIXES: dict[str, tuple[str, ...]] = {
    "test_twenty_steps_agree_with_one_process": (
        "1 rank-",
        "4 ranks-",
        "2 ranks-maml-",
        "2 ranks-first order-",
        "2 ranks-meta-sgd-",
        "2 ranks-adagrad-",
        "2 ranks-rmsprop-",
        "2 ranks-sgd-",
        "2 ranks-sgd with momentum-",
    ),
    "test_the_estimated_peak_of_a_gradient_agrees_with_the_meter": ("transformer-globs0-4-", "transformer-globs1-"),
    "test_tasks_of_several_shapes_are_grouped_cut_and_padded": ("traced-mlp", "traced-conv_batch"),
    "test_gradients_on_every_kind_of_model": (
        "seam_loss-",
        "seam_loss_alone-",
        "seam_keyed-",
        "encode-",
        "platipus-",
        "logistic_head-",
        "nearest_centroid-",
    ),
    "test_the_meta_gradient_through_a_head_is_exact": ("0-fast1-", "2-fast2-", "0-fast0-4-", "2-fast3-12-"),
    "test_meta_gradients_through_a_head_run_as_programs": ("compiled-", "traced-logistic_head"),
    "test_an_answer_with_another_head_changes_no_other_answer": ("draws-",),
    "test_a_cut_is_the_gradient_of_a_loop_that_detaches": ("momentum-", "proximal-", "reads_the_support-"),
    "test_stochastic_rules_run_under_vmap_and_as_programs": (
        "bayes_by_gradient-traced",
        "draws_by_key-traced",
        "platipus",
    ),
    "test_tasks_are_computed_together": ("attentive and latent-traced", "conditional", "latent"),
    "test_an_algorithm_of_the_table_passes_the_check": (
        "ABML",
        "ANIL",
        "BOIL",
        "FOMAML",
        "MAML++",
        "Meta-",
        "Reptile, inner",
        "T-net",
        "WarpGrad",
        "inner ",
        "neural process",
        "transformer neural",
    ),
    # The contract of the learners: some points in the run, some mistakes.
    "test_going_on_from_what_was_saved_gives_the_same_bits_as_never_stopping": ("1-", "2-", "4-", "5-"),
    "test_only_the_scored_tasks_are_learned_in_their_order": (
        "another one besides",
        "another one instead",
        "one is left out at the end",
        "one twice",
    ),
    "test_nothing_is_wider_than_the_screen": tuple(
        f"{state}-{width}"
        for state in ("efficiency", "empty", "figures", "pool", "token", "unwell")
        for width in (768, 1024)
    ),
    "test_the_bound_of_platipus_is_that_of_its_algorithm": ("conv_group_norm-1", "mlp_tanh-1"),
}
"""Tests of which the cases that begin so are slow."""


def is_slow(function: str, case: str = "") -> bool:
    """Return whether a case of a test is slow; ``case`` is its id in brackets, "" where there is one case alone."""
    if function in SLOW:
        return case not in SLOW[function] or not case
    return function in SLOW_PREFIXES and case.startswith(SLOW_PREFIXES[function])


def part_of(id: str) -> int:
    """Return in which part of the slow tests one is, by its id alone."""
    return zlib.crc32(id.encode()) % PARTS
