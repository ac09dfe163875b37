"""The engine: scheduler, KV pages, runner, sampler, and the loop that joins them."""

from jlora.engine.async_engine import AsyncLLMEngine
from jlora.engine.follower import follow
from jlora.engine.llm_engine import LLMEngine

__all__ = ["AsyncLLMEngine", "LLMEngine", "follow"]
