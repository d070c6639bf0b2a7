"""Small random models of transformers, of several architectures."""

from __future__ import annotations

from tests.integrations.transformers.checkpoints import transformers

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def make_llama(**kwargs):
    config = transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **kwargs})
    return transformers.LlamaForCausalLM(config)


def make_bert():  # The last layer has the weight of the embedding, and the bias of its parent.
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def make_falcon():  # Its layers are of a subclass of nn.Linear.
    return transformers.FalconForCausalLM(transformers.FalconConfig(**SIZES, bias=True))


def make_gpt2():  # Its layers are not nn.Linear.
    sizes = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def make_t5():  # It has tied embeddings, and parts that stay in fp32.
    sizes = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, num_heads=4, decoder_start_token_id=0)
    )


def make_encoder_decoder():  # It contains two models of transformers.
    encoder = transformers.BertConfig(**SIZES)
    decoder = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = config.pad_token_id = 0
    return transformers.EncoderDecoderModel(config)
