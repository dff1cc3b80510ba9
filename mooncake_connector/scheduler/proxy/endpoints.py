"""Every endpoint of vLLM's server that clients reach through the proxy, and who serves it.

What is not named here is not forwarded: what changes an engine (``/sleep``, ``/reset_prefix_cache``,
``/collective_rpc``, ``/v1/load_lora_adapter``, ``/start_profile``, ``/pause``), what tells of its inside
(``/server_info``), and what would get round the proxy (``/invocations``, ``/inference/v1/generate``).
"""

from mooncake_connector.scheduler.proxy.openai import CHAT, COMPLETIONS, MESSAGES, RESPONSES

# Prefill computes the prompt, decode answers.
DISAGGREGATED = (COMPLETIONS, CHAT, RESPONSES, MESSAGES)
# Decode computes the prompt and answers: several prompts in one request, or no way to hand one over.
DECODE_ALONE = (f"{CHAT}/batch", "/cohere/v2/chat", "/generative_scoring")
# One decode engine: these generate, too, but not from JSON.
DECODE = (
    ("GET", "/v1/models"),
    ("POST", "/v1/audio/transcriptions"),
    ("POST", "/v1/audio/translations"),
)
# Engines keep responses in their own memory.
STORED = (
    ("GET", RESPONSES + r"/{response_id:[\w.:-]{1,256}}"),
    ("POST", RESPONSES + r"/{response_id:[\w.:-]{1,256}}/cancel"),
)
# The least busy engine of either pool.
ANY = (
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/tokenizer_info"),
    ("POST", f"{MESSAGES}/count_tokens"),
    *(("POST", f"{path}/render") for path in DISAGGREGATED),
    *(("POST", f"{path}/derender") for path in (COMPLETIONS, CHAT)),
    ("POST", "/v1/embeddings"),
    ("POST", "/v2/embed"),
    ("POST", "/pooling"),
    ("POST", "/classify"),
    ("POST", "/score"),
    ("POST", "/v1/score"),
    ("POST", "/rerank"),
    ("POST", "/v1/rerank"),
    ("POST", "/v2/rerank"),
    ("GET", "/version"),
)
