"""Private and undocumented names of other projects that the packages use, in one table.

`test_upstream_names.py` holds it against the code (nothing private is used that is not here) and against what is
installed. A signature that changes fails there before it fails for users.
"""

from typing import NamedTuple

VALUE = {"5.17": "a value"}
"""The signatures of what is not called."""


class UpstreamName(NamedTuple):
    path: str
    signatures: dict[str, str]
    """Names of the parameters by the first version of transformers in which they are these; "a value" for the rest."""
    files: tuple[str, ...]
    why: str
    instead: str
    """What would make it unnecessary."""


_MODEL = "transformers.PreTrainedModel."
_GENERATION = "transformers.GenerationMixin."
_TRAINER = "transformers.Trainer."
_IMAGES = "transformers.image_processing_backends.PilBackend."
_CANDIDATES = "transformers.generation.candidate_generator."
_DECLARED = "every model of transformers declares it so", "a public name for it"
_CPU = "weights in the order of oneDNN's kernels", "torch.compile of single layers without graph breaks"
_FAKE = "memory of a forward pass without running it", "torch.compile's memory estimate as a public call"
# fmt: off
UPSTREAM_NAMES = (
    UpstreamName(
        f"{_MODEL}_init_weights", {"5.17": "self, module"}, ("modeling_llava/modeling_llava.py",), *_DECLARED
    ),
    UpstreamName(f"{_MODEL}_skip_keys_device_placement", VALUE, ("modeling_llava/modeling_llava.py",), *_DECLARED),
    UpstreamName(f"{_MODEL}_supports_attention_backend", VALUE, ("modeling_llava/modeling_llava.py",), *_DECLARED),
    UpstreamName(f"{_MODEL}_supports_flash_attn", VALUE, ("modeling_llava/modeling_llava.py",), *_DECLARED),
    UpstreamName(f"{_MODEL}_supports_flex_attn", VALUE, ("modeling_llava/modeling_llava.py",), *_DECLARED),
    UpstreamName(f"{_MODEL}_supports_sdpa", VALUE, ("modeling_llava/modeling_llava.py",), *_DECLARED),
    UpstreamName(f"{_MODEL}_tied_weights_keys", VALUE, ("modeling_llava/modeling_llava.py",), *_DECLARED),
    UpstreamName(f"{_MODEL}_tp_plan", VALUE, ("modeling_llava/modeling_llava.py",), *_DECLARED),
    UpstreamName(
        f"{_MODEL}_can_compile_fullgraph", VALUE,
        ("modeling_llava/inference/cached_generation.py", "modeling_llava/modeling_llava.py"), *_DECLARED,
    ),
    UpstreamName(f"{_MODEL}_no_split_modules", VALUE, ("modeling_llava/training/trainer.py",), *_DECLARED),
    UpstreamName(
        f"{_MODEL}_hf_peft_config_loaded", VALUE,
        ("modeling_llava/checkpoints/checkpoint_mixin.py", "modeling_llava/checkpoints/original_adapters.py",
         "modeling_llava/checkpoints/saving_mixin.py", "modeling_llava/inference/loading.py",
         "modeling_llava/acceleration/cpu_layers.py",
         "modeling_llava/acceleration/quantization.py"),
        "whether a model holds an adapter", "a public question for it",
    ),
    UpstreamName(
        "transformers.AutoProcessor.from_pretrained", {"5.17": "pretrained_model_name_or_path, kwargs"},
        ("modeling_llava/auto.py",), "it swallows every ValueError, and gives a bare tokenizer",
        "an AutoProcessor that lets errors of a registered processor pass",
    ),
    UpstreamName(
        "transformers.cli.serving.server.build_server",
        {"5.17": "model_manager, chat_handler, completion_handler, response_handler, transcription_handler, "
                 "generation_state, enable_cors",
         "5.20": "model_manager, chat_handler, completion_handler, response_handler, transcription_handler, "
                 "systemone_handler, generation_state, enable_cors"},
        ("modeling_llava/serving/__main__.py",),
        "errors of a request are the sender's", "an own server",
    ),
    UpstreamName(
        "torch.nn.Module._load_from_state_dict",
        {"5.17": "self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs"},
        ("modeling_llava/checkpoints/checkpoint_mixin.py",), "PEFT drops weights without a place in silence",
        "an error of PEFT's for them",
    ),
    UpstreamName(
        "peft.tuners.tuners_utils.check_target_module_exists", {"5.17": "config, key"},
        ("modeling_llava/checkpoints/original_adapters.py",), "which modules an adapter means",
        "a public question for it",
    ),
    UpstreamName(
        f"{_MODEL}_from_config", {"5.17": "config, kwargs"},
        ("modeling_llava/auto.py", "modeling_llava/inference/generation_memory.py"),
        "a model without weights, of a dtype", "from_config of the class, which AutoModel alone has",
    ),
    UpstreamName(
        "transformers.PreTrainedConfig._attn_implementation", VALUE,
        ("modeling_llava/inference/attention_map.py", "modeling_llava/inference/row_cache.py",
         "modeling_llava/acceleration/packed_attention.py", "modeling_llava/acceleration/cpu_layers.py"),
        "which attention runs", "a public reader beside set_attn_implementation",
    ),
    UpstreamName(
        "transformers.models.auto.auto_factory._BaseAutoModelClass", {"5.17": "args, kwargs"},
        ("modeling_llava/auto.py",), "AutoModelForVision2Seq", "a public way to make an Auto class",
    ),
    UpstreamName(
        "transformers.AutoModelForImageTextToText._model_mapping", VALUE, ("modeling_llava/auto.py",),
        "AutoModelForVision2Seq", "a public way to make an Auto class",
    ),
    UpstreamName(
        "transformers.models.auto.image_processing_auto.AutoImageProcessor", {"5.17": ""},
        ("processing_llava/transformers_versions.py",), "5.17 hides it without torchvision",
        "5.18 as the oldest version",
    ),
    UpstreamName(
        "transformers.conversion_mapping.register_checkpoint_conversion_mapping",
        {"5.17": "model_type_or_class_name, mapping, overwrite"},
        ("modeling_llava/image_encoder.py",), "DINOv2's names in 5.17", "5.18 as the oldest version",
    ),
    UpstreamName(
        "transformers.conversion_mapping.get_model_conversion_mapping",
        {"5.17": "model, key_mapping, hf_quantizer, add_legacy"}, ("modeling_llava/checkpoints/weight_checks.py",),
        "which names transformers translates", "a check of names and shapes before weights are read",
    ),
    UpstreamName(
        "transformers.core_model_loading.WeightRenaming", {"5.17": "source_patterns, target_patterns"},
        ("modeling_llava/image_encoder.py",), "DINOv2's names in 5.17", "5.18 as the oldest version",
    ),
    UpstreamName(
        f"{_GENERATION}prepare_inputs_for_generation",
        {"5.17": "self, input_ids, next_sequence_length, past_key_values, attention_mask, inputs_embeds, "
                 "is_first_iteration, kwargs",
         "5.24": "self, input_ids, next_sequence_length, cache, attention_mask, inputs_embeds, is_first_iteration, "
                 "kwargs"},
        ("modeling_llava/generation.py",), "assistants see images in their first step", "5.18's rule for assistants",
    ),
    UpstreamName(
        f"{_GENERATION}_expand_inputs_for_generation",
        {"5.17": "expand_size, is_encoder_decoder, input_ids, model_kwargs",
         "5.18": "self, expand_size, is_encoder_decoder, input_ids, model_kwargs"},
        ("modeling_llava/generation.py",), "images of copied rows; 5.17 does not encode them", "5.18 as the oldest",
    ),
    UpstreamName(
        f"{_GENERATION}_get_candidate_generator",
        {"5.17": "self, generation_config, input_ids, inputs_tensor, logits_processor, model_kwargs, assistant_model, "
                 "target_tokenizer, assistant_tokenizer"},
        ("modeling_llava/generation.py",), "drafts beside images", "an argument of generate for a generator",
    ),
    UpstreamName(
        f"{_GENERATION}_get_logits_processor",
        {"5.17": "self, generation_config, input_ids_seq_length, encoder_input_ids, prefix_allowed_tokens_fn, "
                 "logits_processor, device, model_kwargs, negative_prompt_ids, negative_prompt_attention_mask"},
        ("modeling_llava/inference/batched_generation.py", "modeling_llava/generation.py"),
        "image tokens are no text; batches without generate", "image tokens inside of the vocabulary",
    ),
    UpstreamName(
        f"{_GENERATION}_prefill", {"5.17": "self, input_ids, generation_config, model_kwargs, is_first_iteration"},
        ("modeling_llava/inference/cached_generation.py",), "decoding ahead of the host", "one engine of our own",
    ),
    UpstreamName(
        "transformers.PreTrainedModel.get_compiled_call", {"5.17": "self, compile_config"},
        ("modeling_llava/inference/cached_generation.py",), "decoding ahead of the host", "one engine of our own",
    ),
    UpstreamName(
        f"{_GENERATION}_prepare_cache_for_generation",
        {"5.17": "self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length"},
        ("modeling_llava/generation.py",), "a KV cache that grows without copies", "a cache class by name",
    ),
    UpstreamName(
        f"{_GENERATION}_prepare_generation_config", {"5.17": "self, generation_config, kwargs"},
        ("modeling_llava/inference/token_stream.py",), "the settings of a model, completed", "one engine of our own",
    ),
    UpstreamName(
        f"{_GENERATION}_prepare_special_tokens",
        {"5.17": "self, generation_config, kwargs_has_attention_mask, device, batch_size"},
        ("modeling_llava/inference/batched_generation.py",), "end tokens for the logits processors",
        "one engine of our own",
    ),
    UpstreamName(
        f"{_CANDIDATES}AssistedCandidateGenerator",
        {"5.17": "input_ids, assistant_model, generation_config, model_kwargs, inputs_tensor, logits_processor"},
        ("modeling_llava/generation.py",), "drafts beside images", "an argument of generate for a generator",
    ),
    UpstreamName(
        f"{_CANDIDATES}AssistedCandidateGeneratorDifferentTokenizers",
        {"5.17": "input_ids, assistant_model, target_tokenizer, assistant_tokenizer, generation_config, model_kwargs, "
                 "inputs_tensor, logits_processor"},
        ("modeling_llava/generation.py",), "drafts beside images", "an argument of generate for a generator",
    ),
    UpstreamName(
        f"{_CANDIDATES}PromptLookupCandidateGenerator",
        {"5.17": "eos_token_id, num_output_tokens, max_matching_ngram_size, max_length, logits_processor, vocab_size"},
        ("modeling_llava/generation.py",), "drafts beside images", "an argument of generate for a generator",
    ),
    UpstreamName(
        f"{_CANDIDATES}CandidateGenerator.get_candidates", {"5.17": "self, input_ids, kwargs"},
        ("modeling_llava/generation.py",), "drafts beside images", "an argument of generate for a generator",
    ),
    UpstreamName(
        f"{_CANDIDATES}CandidateGenerator.update_candidate_strategy", {"5.17": "self, input_ids, scores, num_matches"},
        ("modeling_llava/generation.py",), "drafts beside images", "an argument of generate for a generator",
    ),
    UpstreamName(
        "transformers.cache_utils.DynamicLayer.update", {"5.17": "self, key_states, value_states, args, kwargs"},
        ("modeling_llava/generation.py",), "a KV cache that grows without copies", "a cache class by name",
    ),
    UpstreamName(
        "transformers.cache_utils.DynamicSlidingWindowLayer", {"5.17": "sliding_window, kwargs"},
        ("modeling_llava/inference/cached_generation.py",), "which states can be cut", "a public question for it",
    ),
    UpstreamName(
        "transformers.integrations.sdpa_attention.sdpa_attention_forward",
        {"5.17": "module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, kwargs",
         "5.19": "module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, cache, "
                 "kwargs",
         "5.24": "module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, kwargs"},
        ("modeling_llava/acceleration/cpu_layers.py", "modeling_llava/acceleration/packed_attention.py"),
        "attention where ours does not apply", "a public name for it",
    ),
    UpstreamName(
        "transformers.masking_utils.sdpa_mask",
        {"5.17": "batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size, "
                 "allow_is_causal_skip, allow_is_bidirectional_skip, allow_torch_fix, use_vmap, device, kwargs",
         "5.18": "batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size, "
                 "allow_is_causal_skip, allow_is_bidirectional_skip, use_vmap, device, kwargs"},
        ("modeling_llava/acceleration/cpu_layers.py", "modeling_llava/acceleration/packed_attention.py"),
        "masks for our attention functions", "a public name for it",
    ),
    UpstreamName(
        "transformers.modeling_layers.GradientCheckpointingLayer", {"5.17": "args, kwargs"},
        ("modeling_llava/training/run.py", "modeling_llava/training/step_memory.py"),
        "the layers of a language model", "a public question for it",
    ),
    UpstreamName(
        "transformers.ProcessorMixin._merge_kwargs",
        {"5.17": "self, ModelProcessorKwargs, tokenizer_init_kwargs, kwargs"},
        ("processing_llava/processing_llava.py",), "arguments sorted as in transformers", "a public name for it",
    ),
    UpstreamName(
        f"{_IMAGES}_prepare_image_like_inputs", {"5.17": "self, images, args, expected_ndims, kwargs"},
        ("processing_llava/image_processing_llava.py",), "pictures are opened by our reader", "a hook for it",
    ),
    UpstreamName(
        f"{_IMAGES}_preprocess",
        {"5.17": "self, images, do_resize, size, resample, do_center_crop, crop_size, do_rescale, rescale_factor, "
                 "do_normalize, image_mean, image_std, do_pad, pad_size, return_tensors, kwargs"},
        ("processing_llava/image_processing_fast.py", "processing_llava/image_processing_llava.py"),
        "every image processor overrides it", "a public name for it",
    ),
    UpstreamName(
        f"{_IMAGES}_standardize_kwargs",
        {"5.17": "self, size, crop_size, pad_size, default_to_square, image_mean, image_std, kwargs"},
        ("processing_llava/image_processing_llava.py",), "pinpoints and sizes in one form", "a public name for it",
    ),
    UpstreamName(
        f"{_IMAGES}_validate_preprocess_kwargs",
        {"5.17": "self, do_rescale, rescale_factor, do_normalize, image_mean, image_std, do_resize, size, "
                 "do_center_crop, crop_size, resample, kwargs"},
        ("processing_llava/image_processing_fast.py", "processing_llava/image_processing_llava.py"),
        "arguments without effect are refused", "a public name for it",
    ),
    UpstreamName(
        "transformers.utils.hub.cached_file", {"5.17": "path_or_repo_id, filename, kwargs"},
        ("processing_llava/original/file_checks.py",), "one file of a folder or repository",
        "huggingface_hub, without folders",
    ),
    UpstreamName(
        f"{_TRAINER}_get_grad_norm", {"5.17": "self, model, grad_norm"}, ("modeling_llava/training/trainer.py",),
        "a gradient that is no number stops the run", "a callback that sees it",
    ),
    UpstreamName(
        f"{_TRAINER}_get_train_sampler", {"5.17": "self, train_dataset"}, ("modeling_llava/training/trainer.py",),
        "packing", "train_sampling_strategy as a class",
    ),
    UpstreamName(
        f"{_TRAINER}_save", {"5.17": "self, output_dir, state_dict"}, ("modeling_llava/training/trainer.py",),
        "a checkpoint loads like a model", "a callback before saving",
    ),
    UpstreamName(
        f"{_TRAINER}_save_checkpoint", {"5.17": "self, model, trial"}, ("modeling_llava/training/trainer.py",),
        "a checkpoint is on the disk before older ones go", "a callback between saving and removing",
    ),
    UpstreamName(
        f"{_TRAINER}_save_optimizer_and_scheduler", {"5.17": "self, output_dir"},
        ("modeling_llava/training/trainer.py",), "a checkpoint holds its settings", "a callback before saving",
    ),
    UpstreamName(
        "transformers.trainer_pt_utils.BatchRebalanceSampler",
        {"5.17": "lengths, effective_batch_size, dp_size, grad_accum, shuffle, seed, rank, drop_last"},
        ("modeling_llava/training/packed_batches.py",), "batches of like size", "a public name for it",
    ),
    UpstreamName(
        "transformers.CompileConfig._compile_all_devices", VALUE, ("modeling_llava/inference/cached_generation.py",),
        "compiled decoding on a CPU, in tests", "a public field",
    ),
    UpstreamName(
        "transformers.GenerationConfig._pad_token_tensor", VALUE, ("modeling_llava/inference/cached_generation.py",),
        "the token behind an answer", "one engine of our own",
    ),
    UpstreamName(
        "trl.trainer.utils.FusedCausalLMOutput",
        {"5.17": "loss, log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1, label_mask, aux_loss"},
        ("modeling_llava/training/supervised_loss.py",), "what TRL computes its loss from", "a hook of SFTTrainer",
    ),
    UpstreamName(
        "peft.tuners.tuners_utils.BaseTunerLayer", {"5.17": ""}, ("modeling_llava/training/starting_model.py",),
        "layers with an adapter", "a public question for it",
    ),
    UpstreamName(
        "huggingface_hub.dataclasses.type_validator", {"5.17": "name, value, expected_type"},
        ("modeling_llava/records/yaml_fields.py",), "types of recipe fields", "pydantic, which is no dependency",
    ),
    UpstreamName(
        "huggingface_hub.repocard.REGEX_YAML_BLOCK", VALUE, ("modeling_llava/export/repository_check.py",),
        "the head of a card", "RepoCard for cards that it does not take",
    ),
    UpstreamName(
        "gradio_client.utils.is_http_url_like", {"5.17": "possible_url"}, ("spaces_demo/safety.py",),
        "what Gradio takes for an address", "a switch of Gradio for addresses",
    ),
    UpstreamName(
        "torch._subclasses.fake_tensor.FakeTensorMode",
        {"5.17": "allow_fallback_kernels, allow_non_fake_inputs, shape_env, static_shapes, export"},
        ("modeling_llava/inference/generation_memory.py",), *_FAKE,
    ),
    UpstreamName(
        "torch._subclasses.fake_tensor.DataDependentOutputException", {"5.17": "func"},
        ("modeling_llava/inference/generation_memory.py",), *_FAKE,
    ),
    UpstreamName(
        "torch._subclasses.fake_tensor.DynamicOutputShapeException", {"5.17": "func"},
        ("modeling_llava/inference/generation_memory.py",), *_FAKE,
    ),
    UpstreamName(
        "torch.utils._python_dispatch.TorchDispatchMode", {"5.17": "_dispatch_key"},
        ("modeling_llava/inference/generation_memory.py",), *_FAKE,
    ),
    UpstreamName(
        "torch.utils._pytree.tree_map_only", {"5.17": "type_or_types_or_pred, func, tree, is_leaf"},
        ("modeling_llava/inference/generation_memory.py",), *_FAKE,
    ),
    UpstreamName(
        "torch._assert_async", {"5.17": "no signature"}, ("modeling_llava/visual_tokens.py",),
        "a check that CUDA graphs hold", "a public name for it",
    ),
    UpstreamName(
        "torch._dynamo.mark_static_address", {"5.17": "t, guard"}, ("modeling_llava/inference/row_cache.py",),
        "KV caches that CUDA graphs know", "a public name for it",
    ),
    UpstreamName(
        "torch.cpu._is_amx_tile_supported", {"5.17": ""}, ("modeling_llava/acceleration/devices.py",),
        "whether 16-bit floats are fast", "a public question for it",
    ),
    UpstreamName(
        "torch.cpu._is_avx512_bf16_supported", {"5.17": ""}, ("modeling_llava/acceleration/devices.py",),
        "whether 16-bit floats are fast", "a public question for it",
    ),
    UpstreamName(
        "torch.ops.mkldnn._linear_pointwise", {"5.17": "args, kwargs"},
        ("modeling_llava/acceleration/cpu_layers.py",), *_CPU,
    ),
    UpstreamName(
        "torch._make_per_channel_quantized_tensor", {"5.17": "no signature"},
        ("modeling_llava/acceleration/cpu_layers.py",), *_CPU,
    ),
    UpstreamName(
        "torch.ops.mkldnn._reorder_linear_weight", {"5.17": "args, kwargs"},
        ("modeling_llava/acceleration/cpu_layers.py",),
        *_CPU,
    ),
)
# fmt: on
