"""Small random models of `transformers`, one a family: what conversion is compared with.

Each case is a class, its config and the kind of model; nothing is downloaded.
"""

import dataclasses

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.2,
}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    config_class: str
    model_class: str
    settings: dict = dataclasses.field(hash=False)
    # What is compared: decoder, encoder, body (an encoder without a head) or pair (encoder-decoder).
    kind: str = "decoder"

    def build(self, seed=0):
        import torch
        import transformers

        torch.manual_seed(seed)
        config = getattr(transformers, self.config_class)(**self.settings)
        config._attn_implementation = "eager"
        model = getattr(transformers, self.model_class)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # scales and biases begin at one and zero, which would hide a swap
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.add_(torch.randn(buffer.shape) * 0.1)
            if self.name == "t5_1.1":  # transformers 5 makes models with tied tables, and opens untied ones
                model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape) * 0.2)
                model.config.tie_word_embeddings = False
        return model


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DECODERS = [
    Case(
        "gpt2",
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
        | {"bos_token_id": None, "eos_token_id": None},
    ),
    Case("llama2", "LlamaConfig", "LlamaForCausalLM", SIZES),
    Case(
        "llama3",
        "LlamaConfig",
        "LlamaForCausalLM",
        SIZES | {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    Case("llama_biased", "LlamaConfig", "LlamaForCausalLM", SIZES | {"attention_bias": True, "mlp_bias": True}),
    Case("llama_yarn", "LlamaConfig", "LlamaForCausalLM", SIZES | {"rope_scaling": YARN}),
    Case("mistral", "MistralConfig", "MistralForCausalLM", SIZES | {"sliding_window": 5, "head_dim": 16}),
    Case("qwen2", "Qwen2Config", "Qwen2ForCausalLM", SIZES),
    Case(
        "qwen2_windows",
        "Qwen2Config",
        "Qwen2ForCausalLM",
        SIZES | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    Case("qwen3", "Qwen3Config", "Qwen3ForCausalLM", SIZES | {"head_dim": 16, "tie_word_embeddings": True}),
    Case("gemma", "GemmaConfig", "GemmaForCausalLM", SIZES | {"head_dim": 16}),
    Case(
        "gemma2",
        "Gemma2Config",
        "Gemma2ForCausalLM",
        SIZES | {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 24},
    ),
    Case(
        "gemma3",
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        SIZES
        | {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 24, "num_hidden_layers": 7}
        | {"_sliding_window_pattern": 3, "sliding_window_pattern": 3},
    ),
]
MLA = {"kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
DEEPSEEK = SIZES | MLA | {"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_shared_experts": 2}
DEEPSEEK |= {"moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3}
YARN_LATENT = YARN | {"mscale": 0.8, "mscale_all_dim": 1.0}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 6}
EXPERTS = [
    Case("mixtral", "MixtralConfig", "MixtralForCausalLM", SIZES | {"num_local_experts": 4}),
    Case(
        "qwen2_moe",
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        SIZES | MOE | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    ),
    Case(
        "qwen3_moe",
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        SIZES | MOE | {"head_dim": 16, "norm_topk_prob": True, "decoder_sparse_step": 2},
    ),
    Case(
        "deepseek_v2",
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        DEEPSEEK | {"q_lora_rank": None, "routed_scaling_factor": 1.5},
    ),
    Case(
        "deepseek_v2_groups",
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        DEEPSEEK | {"q_lora_rank": 16, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    Case(
        "deepseek_v3",
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        DEEPSEEK | {"q_lora_rank": 16, "n_group": 4, "topk_group": 2, "rope_scaling": YARN_LATENT},
    ),
]

# Without grouped keys, which these families do not have.
ENCODER = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
SPECIAL = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "initializer_factor": 0.5}
BART = {"vocab_size": 97, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "max_position_embeddings": 64}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BART |= {"init_std": 0.2, "scale_embedding": True, "forced_eos_token_id": None}
ENCODERS = [
    Case("bert_mlm", "BertConfig", "BertForMaskedLM", ENCODER, "encoder"),
    Case("bert_nsp", "BertConfig", "BertForPreTraining", ENCODER, "encoder"),
    Case("bert_body", "BertConfig", "BertModel", ENCODER, "body"),
    Case("roberta", "RobertaConfig", "RobertaForMaskedLM", ENCODER | {"pad_token_id": 1}, "encoder"),
    Case("albert_sop", "AlbertConfig", "AlbertForPreTraining", ENCODER | {"embedding_size": 16}, "encoder"),
    Case("albert_mlm", "AlbertConfig", "AlbertForMaskedLM", ENCODER | {"embedding_size": 16}, "encoder"),
    Case(
        "modernbert",
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        ENCODER | SPECIAL | {"num_hidden_layers": 7, "local_attention": 6},
        "encoder",
    ),
]
PAIRS = [
    Case("t5_1.0", "T5Config", "T5ForConditionalGeneration", T5, "pair"),
    Case(
        "t5_1.1",
        "T5Config",
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu"} | {"scale_decoder_outputs": False},
        "pair",
    ),
    Case("bart", "BartConfig", "BartForConditionalGeneration", BART, "pair"),
]
CASES = [*DECODERS, *EXPERTS, *ENCODERS, *PAIRS]
