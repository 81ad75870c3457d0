"""One-line mutations, each of which a test has to notice: of figures, masks, schedules, hashes, samplers, resuming."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """What is said instead in a file, and the tests that are to fail then (paths, or tests of them, with spaces).

    before: occurs once in the file, whitespace at the ends left out.
    """

    name: str
    file: str
    before: str
    after: str
    tests: str


_FIGURES = "tests/train/test_figures.py::test_"
_PEAK = _FIGURES + "a_peak_is_what_a_product_computes_over_the_time_of_the_fastest"
_STEP = _FIGURES + "a_steps_figures_are_those_of_all_ranks"
_TRAINING_BITS = _FIGURES + "bits_per_byte_of_training_count_the_end_of_every_document"
_DROPOUT = _FIGURES + "ranks_steps_and_seeds_draw_dropout_of_their_own_and_the_same_again"
_COMPRESSORS = "tests/cli/test_figures.py::test_quickstart_weighs_whole_bytes_in_bits"
_RATES = "tests/train/test_schedule.py::test_every_step_has_the_factor_of_its_end"
_FLOPS = "tests/model/test_flops.py"
_PADDING = "tests/model/test_padding.py"
_SCHEDULE = "tests/train/test_schedule.py::test_"
_HELD_OUT = "tests/evaluate/test_held_out.py"
_ACCOUNTING = "tests/model/test_accounting.py"
_SAMPLING = "tests/inference/test_sampling.py"
_ROUTER = "src/swamla/model/ffns/router.py"
_RECALL, _RECALL_TESTS = "src/swamla/evaluate/recall_grid.py", "tests/evaluate/test_recall.py"

MUTATIONS = [
    # figures
    Mutation(
        "xz is given half of the bytes",
        "src/swamla/cli/quickstart.py",
        '"xz -9e": len(lzma.compress(held_out,',
        '"xz -9e": len(lzma.compress(held_out[: len(held_out) // 2],',
        _COMPRESSORS,
    ),
    Mutation(
        "compressors' bytes are called bits",
        "src/swamla/cli/quickstart.py",
        "{8 * size / len(held_out):.3f}",
        "{size / len(held_out):.3f}",
        _COMPRESSORS,
    ),
    Mutation(
        "a matrix product counts half of its operations",
        "src/swamla/train/utilisation.py",
        "return 2 * size**3 / fastest",
        "return size**3 / fastest",
        _PEAK,
    ),
    Mutation(
        "benchmarks' matrix products count half of their operations",
        "benchmarks/tables/training.py",
        "reached = MATMULS * 2 * side**3 /",
        "reached = MATMULS * side**3 /",
        "tests/benchmarks/test_cpu.py::test_a_share_is_of_what_square_products_reach_in_the_same_rounds",
    ),
    Mutation(
        "a peak is that of the slower library",
        "src/swamla/train/utilisation.py",
        "fastest = min(fastest, *(",
        "fastest = min(fastest, max(",
        _PEAK,
    ),
    Mutation(
        "the peak of a run is halved",
        "src/swamla/train/utilisation.py",
        "return matmul_flops(device, dtype, seconds=0.05)",
        "return matmul_flops(device, dtype, seconds=0.05) / 2",
        _FIGURES + "the_peak_of_a_run_is_that_measurement",
    ),
    Mutation(
        "mfu's peak is halved",
        "src/swamla/train/tracking/step_log.py",
        "(self.peak.flops * distributed.world_size())",
        "(0.5 * self.peak.flops * distributed.world_size())",
        _STEP,
    ),
    Mutation(
        "mfu is not divided by the ranks",
        "src/swamla/train/tracking/step_log.py",
        "(self.peak.flops * distributed.world_size())",
        "self.peak.flops",
        _STEP,
    ),
    Mutation(
        "tokens a second count seconds twice",
        "src/swamla/train/tracking/step_log.py",
        '"tokens_per_second": result.tokens / seconds,',
        '"tokens_per_second": result.tokens / seconds**2,',
        _STEP,
    ),
    Mutation(
        "the speed on the screen forgets nothing",
        "src/swamla/train/tracking/step_log.py",
        "self.recent_tokens = 0.9 * self.recent_tokens + result.tokens",
        "self.recent_tokens = self.recent_tokens + result.tokens",
        _STEP,
    ),
    Mutation(
        "bits per byte of training leave out the ends of documents",
        "src/swamla/data/dataset.py",
        "return self.train.n_bytes / (self.train.n_tokens + self.train.n_documents)",
        "return self.train.n_bytes / self.train.n_tokens",
        _TRAINING_BITS,
    ),
    Mutation(
        "bits per byte of training are nats",
        "src/swamla/train/run.py",
        "bits_per_nat = None if size is None else 1 / (math.log(2) * size)",
        "bits_per_nat = None if size is None else 1 / size",
        _TRAINING_BITS,
    ),
    Mutation(
        "bits per byte of held-out text are nats",
        "src/swamla/evaluate/held_out.py",
        "return self.loss * self.tokens / math.log(2) / self.bytes",
        "return self.loss * self.tokens / self.bytes",
        _HELD_OUT,
    ),
    Mutation(
        "held-out bytes leave out the ends of documents",
        "src/swamla/evaluate/held_out.py",
        "labels = split.n_tokens + split.n_documents",
        "labels = split.n_tokens",
        _HELD_OUT,
    ),
    Mutation(
        "perplexity is 2 to the loss",
        "src/swamla/evaluate/held_out.py",
        "return math.exp(self.loss) if",
        "return 2**self.loss if",
        _HELD_OUT,
    ),
    Mutation(
        "bytes of tokens are not compared with those counted",
        "src/swamla/evaluate/held_out.py",
        "decode(split.document(i).tolist()).encode()",
        "decode(split.document(i).tolist())",
        _HELD_OUT,
    ),
    Mutation(
        "throughput's MB are MiB",
        "src/swamla/data/dataset.py",
        "{self.bytes / seconds / 1e6:.1f} MB/s",
        "{self.bytes / seconds / 2**20:.1f} MB/s",
        _FIGURES + "throughput",
    ),
    Mutation(
        "memory is told in kB as if in bytes",
        "src/swamla/train/utilisation.py",
        '(1 if sys.platform == "darwin" else 1024)',
        "1",
        _FIGURES + "memory_is_told_in_bytes",
    ),
    Mutation(
        "the time left is the time of the whole run",
        "src/swamla/train/tracking/display.py",
        "left = round(seconds * (1 - progress) / progress)",
        "left = round(seconds / progress)",
        "tests/train/test_tracking.py",
    ),
    Mutation(
        "a copy counts the bytes it reads alone",
        "src/swamla/bench/measuring.py",
        '"copy_bytes": 2 * n_bytes / copying.median',
        '"copy_bytes": n_bytes / copying.median',
        "tests/bench/test_measuring.py::test_a_copy_reads_and_writes_each_byte",
    ),
    Mutation(
        "the busiest expert is compared with the sum of all",
        "src/swamla/train/router_health.py",
        "load_E.max().item() / load_E.double().mean().item()",
        "load_E.max().item() / load_E.double().sum().item()",
        "tests/train/test_router_health.py::test_figures_are_of_the_layers_with_a_router_only",
    ),
    Mutation(
        "a router's entropy is a sum",
        "src/swamla/train/router_health.py",
        'statistics[f"entropy/{layer}"].item() / statistics[f"tokens/{layer}"].item()',
        'statistics[f"entropy/{layer}"].item()',
        "tests/train/test_router_health.py::test_figures_are_of_the_layers_with_a_router_only",
    ),
    Mutation(
        "a thousand is written as a million",
        "src/swamla/cli/info_tables.py",
        '("M", 1e6), ("k", 1e3)',
        '("M", 1e6), ("M", 1e3)',
        "tests/cli/test_figures.py::test_numbers_are_told_with_the_prefix_they_have",
    ),
    Mutation(
        "bits per byte of a run are its last, not its best",
        "src/swamla/cli/runs.py",
        'best = min(_evaluations(records), key=lambda r: r["held_out_loss"], default={})',
        'best = max(_evaluations(records), key=lambda r: r["held_out_loss"], default={})',
        "tests/cli/test_runs.py::test_a_row_says_what_a_run_is_how_far_it_came_and_how_good_it_is",
    ),
    # accounting
    Mutation(
        "the delta rule touches its state once, not three times",
        "src/swamla/model/mixers/gdn.py",
        "+ length * 6 * head_k * head_v",
        "+ length * 2 * head_k * head_v",
        _FLOPS,
    ),
    Mutation(
        "the delta rule's last chunk is always whole",
        "src/swamla/model/mixers/gdn.py",
        "squares = length // CHUNK * CHUNK**2 + (length % CHUNK) ** 2",
        "squares = length * CHUNK",
        _FLOPS,
    ),
    Mutation(
        "attention sees the future in FLOPs",
        "src/swamla/model/mixers/softmax.py",
        "return length * (length + 1) // 2",
        "return length * length",
        _ACCOUNTING,
    ),
    Mutation(
        "values are as wide as keys in FLOPs",
        "src/swamla/model/mixers/softmax.py",
        "2 * self.n_heads * (key + value) * self.pairs(length)",
        "2 * self.n_heads * (key + key) * self.pairs(length)",
        _ACCOUNTING,
    ),
    Mutation(
        "a plugin's file is not kept",
        "src/swamla/config.py",
        'plugin = plugin_of(type(config)) if isinstance(config, Registered) else ""',
        'plugin = ""',
        "tests/test_registry.py::test_a_config_with_foreign_kinds_says_their_files_and_comes_back",
    ),
    Mutation(
        "a backend that was named is changed",
        "src/swamla/model/mixers/mixer.py",
        'return replace(self, **chosen) if self.BACKENDS and self.__dict__["backend"] == "auto" else self',
        "return replace(self, **chosen) if self.BACKENDS else self",
        "tests/test_registry.py::test_a_backend_is_given_to_a_mixer_that_leaves_it_open_and_to_no_other",
    ),
    Mutation(
        "outputs do not start smaller",
        "src/swamla/model/language_model.py",
        "scale = (2 * self.config.depth) ** -0.5 if name in outputs else 1.0",
        "scale = 1.0",
        "tests/model/test_initial.py",
    ),
    Mutation(
        "a window is one token too long in FLOPs",
        "src/swamla/model/mixers/swa.py",
        "beyond = max(0, length - self.window)",
        "beyond = max(0, length - self.window - 1)",
        _ACCOUNTING,
    ),
    Mutation(
        "backward costs as much as forward",
        "src/swamla/model/accounting.py",
        "return 3 * forward_flops(config, length) / length",
        "return 2 * forward_flops(config, length) / length",
        _ACCOUNTING,
    ),
    Mutation(
        "padding counts as a document in FLOPs",
        "src/swamla/model/accounting.py",
        "[ids[:, 1:].flat[begins] != PADDING]",
        "",
        _FLOPS,
    ),
    Mutation(
        "a document runs on into the next row in FLOPs",
        "src/swamla/model/accounting.py",
        "ids = np.pad(document_BT.numpy(), ((0, 0), (1, 0)), constant_values=PADDING - 1)",
        "ids = np.pad(document_BT.numpy().reshape(1, -1), ((0, 0), (1, 0)), constant_values=PADDING - 1)",
        _FLOPS,
    ),
    Mutation(
        "a latent state forgets its rotary key in bytes",
        "src/swamla/model/mixers/mla.py",
        "return length * (self.kv_lora_rank + self.qk_rope_head_dim) * element_bytes",
        "return length * self.kv_lora_rank * element_bytes",
        "tests/model/test_step.py",
    ),
    Mutation(
        "every expert is active",
        "src/swamla/model/ffns/moe.py",
        "return self.n_parameters(width) - (self.n_experts - self.n_activated) * 3 * inner * hidden",
        "return self.n_parameters(width)",
        _ACCOUNTING,
    ),
    Mutation(
        "a block's convolution costs nothing in FLOPs",
        "src/swamla/model/block.py",
        "return halves + 2 * self.conv_parameters(width) * length",
        "return halves",
        "tests/model/test_block.py",
    ),
    Mutation(
        "a block's convolution keeps an input too many in bytes",
        "src/swamla/model/block.py",
        "max(0, self.conv - 1) * width * element_bytes",
        "max(0, self.conv) * width * element_bytes",
        "tests/model/test_block.py",
    ),
    Mutation(
        "a layer without an FFN has a norm for it",
        "src/swamla/model/block.py",
        "return 1 if self.ffn.is_absent else 2",
        "return 2",
        _ACCOUNTING,
    ),
    Mutation(
        "the gate of shared experts has no parameters",
        "src/swamla/model/ffns/moe.py",
        '"shared gate": 0 if self.shared_gate == "none" else width,',
        '"shared gate": 0,',
        _ACCOUNTING,
    ),
    Mutation(
        "a group of experts counts as much as its best one",
        _ROUTER,
        "best = by_group.topk(2, dim=-1).values.sum(-1)",
        "best = by_group.topk(1, dim=-1).values.sum(-1)",
        "tests/model/test_router.py",
    ),
    # padding and masks
    Mutation(
        "padding is routed",
        "src/swamla/model/ffns/moe.py",
        "expert_NK = routing.expert_NK.masked_fill(~real_BT.flatten()[:, None], self.config.n_experts)",
        "expert_NK = routing.expert_NK",
        _PADDING,
    ),
    Mutation(
        "padding has logits to keep small",
        _ROUTER,
        "return logits_BTE.logsumexp(-1).square().where(real_BT, 0.0).sum()",
        "return logits_BTE.logsumexp(-1).square().sum()",
        _PADDING,
    ),
    Mutation(
        "padding makes sequences longer in the balance loss",
        _ROUTER,
        "time_B1 = real_BT1.sum(1).clamp(min=1)",
        "time_B1 = real_BT1.shape[1]",
        _PADDING,
    ),
    Mutation(
        "padding has an entropy",
        _ROUTER,
        '"entropy": entropy_BT.where(real_BT, 0.0).sum()',
        '"entropy": entropy_BT.sum()',
        _PADDING,
    ),
    Mutation(
        "busy experts are made busier",
        _ROUTER,
        "self.bias += rate * (load_E.mean() - load_E).sign()",
        "self.bias += rate * (load_E - load_E.mean()).sign()",
        "tests/model/test_moe.py",
    ),
    Mutation(
        "rows that nobody wrote are read",
        "src/swamla/ops/grouped_mm.py",
        "y[int(ends_E[-1]) :] = 0",
        "y[int(ends_E[-1]) :] = 1",
        "tests/ops/test_grouped_mm.py",
    ),
    Mutation(
        "a window is one token too long",
        "src/swamla/ops/attention/reference.py",
        "(distance_TS < window.size)",
        "(distance_TS <= window.size)",
        "tests/ops/test_windowed_attention.py",
    ),
    Mutation(
        "sinks are those of the row, not of the document",
        "src/swamla/ops/attention/reference.py",
        "(seq.position_BT < window.sinks)[:, None, :]",
        "(index_T < window.sinks)[None, None, :]",
        "tests/ops/test_windowed_attention.py",
    ),
    Mutation(
        "positions run on over documents",
        "src/swamla/ops/layout.py",
        "return cls(document_BT, index_T - begin_BT, runs,",
        "return cls(document_BT, index_T - 0 * begin_BT, runs,",
        "tests/ops/test_layout.py",
    ),
    # schedules
    Mutation(
        "warm-up by steps begins at 0",
        "src/swamla/train/schedule.py",
        "(step + 1) / warmup if",
        "step / warmup if",
        _RATES,
    ),
    Mutation(
        "a step's end is its middle",
        "src/swamla/train/schedule.py",
        "one_step = progress / (step + 1)",
        "one_step = progress / (step + 0.5)",
        _RATES,
    ),
    Mutation(
        "the rate of a step is that of its middle",
        "src/swamla/train/config.py",
        "self.horizon.progress(step + 1, seconds)",
        "self.horizon.progress(step + 0.5, seconds)",
        _SCHEDULE + "a_run_trains_with_exactly_these_rates_however_often_it_is_resumed",
    ),
    Mutation(
        "the stable rate decays over twice its share",
        "src/swamla/train/schedule.py",
        "(1 - progress) / self.decay",
        "(1 - progress) / (2 * self.decay)",
        _RATES,
    ),
    Mutation(
        "a run ends by the later of steps and time",
        "src/swamla/train/schedule.py",
        "return max(by_step, by_time)",
        "return min(by_step, by_time)",
        _SCHEDULE + "progress_is_the_further_of_steps_and_time",
    ),
    Mutation(
        "clipping leaves the norm as it is",
        "src/swamla/train/parallel/strategy.py",
        "largest / (norm + 1e-6)",
        "norm / (norm + 1e-6)",
        _FIGURES + "clipping_leaves_a_gradient_of_the_largest_norm_allowed",
    ),
    # hashes, seeds and samplers
    Mutation(
        "ranks drop out alike",
        "src/swamla/train/parallel/strategy.py",
        "rank {distributed.rank()}",
        "rank 0",
        _DROPOUT,
    ),
    Mutation(
        "ranks drop out alike in every step",
        "src/swamla/train/parallel/strategy.py",
        "{seed}/step {step}/rank",
        "{seed}/step 0/rank",
        _DROPOUT,
    ),
    Mutation(
        "top_p keeps one more where its sum is exact",
        "src/swamla/inference/sampling.py",
        "before_BV >= max(self.top_p, SMALLEST)",
        "before_BV > max(self.top_p, SMALLEST)",
        _SAMPLING,
    ),
    Mutation(
        "top_p takes equally likely tokens in any order",
        "src/swamla/inference/sampling.py",
        "probabilities_BV.sort(dim=-1, descending=True, stable=True)",
        "[found.flip(-1) for found in probabilities_BV.sort(dim=-1, stable=True)]",
        _SAMPLING,
    ),
    Mutation(
        "temperature flattens where it should sharpen",
        "src/swamla/inference/sampling.py",
        "logits_BV.amax(dim=-1, keepdim=True)) / max(",
        "logits_BV.amax(dim=-1, keepdim=True)) * max(",
        _SAMPLING,
    ),
    Mutation(
        "every row draws the same",
        "src/swamla/inference/sampling.py",
        "manual_seed(self.seed + row)",
        "manual_seed(self.seed)",
        _SAMPLING,
    ),
    Mutation(
        "epochs are shuffled alike",
        "src/swamla/data/packing.py",
        "np.random.SeedSequence(list(key))",
        "np.random.SeedSequence(list(key[:1]))",
        "tests/data/test_packing.py",
    ),
    Mutation(
        "a few held-out rows are the first ones",
        "src/swamla/data/packing.py",
        "chosen = np.arange(count) * self.n_rows // count",
        "chosen = np.arange(count)",
        "tests/data/test_packing.py",
    ),
    Mutation(
        "data are known without what their files hold",
        "src/swamla/data/dataset.py",
        'hashes = {name: entry["sha256"] for name, entry in meta["files"].items()}',
        'hashes = {name: "" for name, entry in meta["files"].items()}',
        "tests/data/test_preparing.py::test_a_changed_file_or_tokenizer_file_makes_a_new_dataset",
    ),
    Mutation(
        "an altered checkpoint of the right size is whole",
        "src/swamla/checkpoint/folder.py",
        'if hashes and sha256_of(file) != entry(listed, "sha256", str, file=listing):',
        'if hashes and sha256_of(file) == "":',
        "tests/test_checkpoint.py",
    ),
    # resuming
    Mutation(
        "a resumed run draws its random numbers anew",
        "src/swamla/train/state.py",
        'set_generator_states(checkpoint.tensors("rng"))',
        'checkpoint.tensors("rng")',
        "tests/train/test_resume.py::test_a_damaged_newest_checkpoint_is_fallen_back_from_and_set_aside",
    ),
    Mutation(
        "a run reads the same rows in every step",
        "src/swamla/train/loop.py",
        "state.sample += this.rows",
        "state.sample += 0",
        "tests/train/test_trackers.py::test_mfu_is_the_models_flops_over_the_named_peak",
    ),
    Mutation(
        "averages of weights give the newest as much as all before",
        "src/swamla/train/ema.py",
        "newest = (1 - self.decay) / (1 - self.decay**count)",
        "newest = 1 - self.decay",
        "tests/train/test_ema.py::test_the_average_is_the_weighted_mean_of_the_weights_after_every_step",
    ),
    Mutation(
        "n-grams reach into the document before",
        "src/swamla/model/ngrams.py",
        ".where(seq.position_BT >= back, 0)",
        ".where(seq.position_BT >= 0, 0)",
        "tests/model/test_ngrams.py",
    ),
    Mutation(
        "bounded logits have the gradient of unbounded ones",
        "src/swamla/ops/cross_entropy.py",
        "slope_CV = 1 - tanh_CV.square() if need_gradients else None",
        "slope_CV = None",
        "tests/ops/test_cross_entropy.py",
    ),
    Mutation(
        "queries and keys are normalised without their gain",
        "src/swamla/model/mixers/mha.py",
        'return norm(x_BTHK) if self.config.qk_norm == "head"',
        'return x_BTHK if self.config.qk_norm == "head"',
        "tests/model/test_mha.py",
    ),
    Mutation(
        "the time to a score is that of the first point below it",
        "benchmarks/quality.py",
        "share = (before[1] - target) / (before[1] - bits)",
        "share = 1.0",
        "tests/benchmarks/test_quality.py",
    ),
    Mutation(
        "intervals of the speedrun are of 90 %",
        "benchmarks/quality_page.py",
        "t.ppf(0.975,",
        "t.ppf(0.95,",
        "tests/benchmarks/test_quality.py",
    ),
    # into other programs
    Mutation(
        "gains that are stored less 1 are read as they are",
        "src/swamla/interop/weights.py",
        "torch.promote_types(found[0].dtype, torch.float32)) + 1",
        "torch.promote_types(found[0].dtype, torch.float32)) + 0",
        "tests/interop/test_architectures.py",
    ),
    Mutation(
        "a setting that an architecture lacks is not noticed",
        "src/swamla/interop/equality.py",
        "if ours != theirs:",
        "if False:",
        "tests/interop/test_gpt2.py",
    ),
    Mutation(
        "results behind padding stand one token off",
        "src/swamla/interop/transformers/rows.py",
        "self.back_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)",
        "self.back_BT = (mask_BT.cumsum(dim=1) - 2).clamp(min=0)",
        "tests/interop/test_transformers.py",
    ),
    Mutation(
        "the bounded decay has one rate for all heads",
        "src/swamla/model/mixers/gdn.py",
        "return SAFE_DECAY * torch.sigmoid(rate * time_step)",
        "return SAFE_DECAY * torch.sigmoid(time_step)",
        "tests/model/test_gdn.py tests/model/test_kda.py",
    ),
    Mutation(
        "the best continuation is scored without its first token",
        "src/swamla/evaluate/harness.py",
        "nats[indices] = log_softmax(logits_BV).cpu()[rows, first].double()",
        "nats[indices] = 0.0",
        "tests/evaluate/test_harness.py",
    ),
    Mutation(
        "recall is scored on rows of training",
        _RECALL,
        "held_out=True)",
        "held_out=False)",
        _RECALL_TESTS,
    ),
    Mutation(
        "recall's state is of one token",
        _RECALL,
        "state_bytes=state_bytes(model.config, task.length),",
        "state_bytes=state_bytes(model.config, 1),",
        _RECALL_TESTS,
    ),
    Mutation(
        "recall's intervals take the queries of a row for independent",
        _RECALL,
        "return queries / max(1.0, between / independent)",
        "return float(queries)",
        _RECALL_TESTS,
    ),
    Mutation(
        "Wilson's interval is centred on the share",
        _RECALL,
        "centre, shrink = share + z * z / (2 * trials), 1 + z * z / trials",
        "centre, shrink = share, 1 + z * z / trials",
        _RECALL_TESTS,
    ),
    Mutation(
        "an id that is never generated may be an answer to a task",
        _RECALL,
        "model.logits(part_QD)[:, : model.known_ids].argmax(dim=-1)",
        "model.logits(part_QD).argmax(dim=-1)",
        _RECALL_TESTS,
    ),
]
