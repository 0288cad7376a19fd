#!/usr/bin/env python3
"""router.py: one address for many language models.

Clients speak OpenAI Chat; the router rates how hard a request is, walks a list of
(provider, model, key) candidates until one answers, and passes the answer on. Failures
before the first useful event stay unseen; failures after it are told, never faked.

Contents (each section uses only the ones above it):

  FACTS        1. Errors           what can go wrong, and the HTTP status of each
               2. Providers        the provider table, and base URLs
               3. Models           rating, window, price and abilities of known models
               4. Config           every setting, read once from the environment
               5. Tokens           how large a request is
  LANGUAGES    6. Events           server-sent events as bytes, and where they end
               7. Chat             the one shape used inside: parse, check, look at it
               8. Replies          what a provider's answer holds: useful, empty, error, usage
               9. Outgoing         the body a provider gets: the client's bytes with few edits
              10. Hub              what every translation shares: an answer's opening, sealed values
              11. Dialects         which dialect is read how, and events on their way to the client
  MEMORY      12. Keys             which key may be used, per (key, model)
              13. Breakers         which provider is resting
              14. Usage            what was asked, answered, failed and spent
  JUDGEMENT   15. Difficulty       how hard is this request?
              16. Plan             which candidates, in what order, and why
              17. Verdicts         what an outcome means, and what rests for how long
  ACTION      18. Transport        connections to providers, cut when nobody waits any more
              19. Upstream         one attempt: send, wait for something useful, judge
              20. Router           plan, try, learn, answer
  SURFACE     21. Status           what /v1/status, /v1/models and /metrics say
              22. Endpoints        Flask: routes, auth, errors
              23. Server           Waitress: elastic workers, JSON errors, closed clients noticed
              24. Documents        .env.example and the printed pages of docs/
              25. Command line     serve, check, key, status, docs ...

Rooms that later releases open: Limits, Cache and Registry after Usage, Catalog after Router,
Dashboard after Status.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hmac
import itertools
import json
import logging
import math
import os
import re
import secrets
import select
import signal
import socket
import ssl
import stat
import sys
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal, NamedTuple, cast
from urllib.parse import SplitResult, urlsplit

import flask
import requests
import requests.adapters
import urllib3
import urllib3.exceptions
import waitress.channel
import waitress.server
import waitress.task
import waitress.wasyncore
from werkzeug.exceptions import HTTPException

__version__ = "0.1.0"

log = logging.getLogger("hermes-router")

Json = dict[str, Any]

# =============================================================================
# 1. Errors
# =============================================================================


class RouterError(Exception):
    """Anything a client is told about. Subclasses set the class attributes only.

    `param` names the offending request field, `retry_after` is in seconds, `tried` lists
    redacted attempts ("groq/m1: 429 rate_limited").
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "router_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        tried: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.message, self.param = message, param
        self.code = code or type(self).code
        self.retry_after, self.tried = retry_after, tuple(tried)
        self.attempts = 0  # candidates that were tried


class BadRequest(RouterError):
    status, kind = 400, "invalid_request_error"


class Unauthorized(RouterError):
    status, kind, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(RouterError):
    status, kind, code = 403, "permission_error", "forbidden"


class NotFound(RouterError):
    status, kind, code = 404, "invalid_request_error", "not_found"


class MethodNotAllowed(RouterError):
    status, kind, code = 405, "invalid_request_error", "method_not_allowed"


class TooLarge(RouterError):
    status, kind, code = 413, "invalid_request_error", "request_too_large"


class UnsupportedMedia(RouterError):
    status, kind, code = 415, "invalid_request_error", "unsupported_media_type"


class OverLimit(RouterError):
    status, kind, code = 429, "rate_limit_error", "rate_limit_exceeded"


class Exhausted(RouterError):
    """Every candidate was tried or ruled out."""

    status, kind, code = 503, "router_error", "all_providers_exhausted"


class Busy(RouterError):
    """This process holds as many requests as it may (MAX_STREAMS)."""

    status, kind, code = 503, "router_error", "router_busy"


class ClientGone(Exception):
    """The client closed its connection; nobody is left to answer."""


class ConfigError(Exception):
    """Settings that cannot be used; `problems` names every one of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


def error_body(error: RouterError) -> Json:
    """The OpenAI error envelope, with `detail` for clients of FastAPI-style servers."""
    return {
        "error": {
            "message": error.message,
            "type": error.kind,
            "param": error.param,
            "code": error.code,
            **({"attempts": list(error.tried)} if error.tried else {}),
        },
        "detail": "Unauthorized" if error.status == 401 else error.message,
    }


# =============================================================================
# 2. Providers
# =============================================================================


@dataclass(frozen=True)
class FreeLimits:
    """What costs nothing: requests and tokens per minute and day; None = not published."""

    rpm: int | None = None
    rpd: int | None = None
    tpm: int | None = None
    tpd: int | None = None
    concurrency: int | None = None
    text: str = ""


@dataclass(frozen=True)
class Provider:
    """One upstream. Everything peculiar to it is a field here, never an `if` elsewhere."""

    name: str
    title: str
    url: str  # may hold {placeholders} that `extra_env` fills
    key_env: tuple[str, ...]  # singular stems, most specific first; X_KEYS and X_KEY_2 follow
    models: tuple[str, ...]  # what is asked when nothing else is configured, best first
    tier: str  # free, trial, paid, subscription or local
    dialect: str = "chat"  # chat, messages or codex
    embed_model: str = ""
    embed_dims: int = 0
    skip_tokens_over: int = 0  # larger requests are never sent; 0 = no ceiling
    max_output_tokens: int = 0  # larger wishes are lowered to this; 0 = no ceiling
    context_window: int = 0  # tokens, for models without a row of their own; 0 = unknown
    headers: tuple[tuple[str, str], ...] = ()  # sent with every request
    stream_options: bool = True  # False: asking for usage in a stream breaks something
    free: FreeLimits = FreeLimits()
    trains_on_prompts: str = "unknown"  # yes, no or unknown; yes is about the free tier
    aliases: tuple[str, ...] = ()
    keyless: bool = False  # answers without a key
    state: str = "alive"  # alive, changed or retired, as seen on `state_date`
    state_date: str = ""
    note: str = ""
    reasoning_replay: str = "reject"  # accept: reasoning of earlier turns may come back
    signup: str = ""
    extra_env: tuple[tuple[str, str], ...] = ()  # (placeholder in url, variable that fills it)
    key_prefix: tuple[str, ...] = ()  # how its keys start; empty = no fixed shape

    @property
    def known_path(self) -> str:
        """The path a bare host gets, so that three spellings of a base URL mean one place."""
        return urlsplit(self.url).path


# The first nineteen keep the order people know; it decides ties and how tables are printed.
PROVIDERS = (
    Provider(
        "gemini",
        "Google Gemini API",
        "https://generativelanguage.googleapis.com/v1beta/openai",
        ("GEMINI_API_KEY", "GOOGLE_API_KEY", "PROVIDER_KEY_GEMINI", "EXTERNAL_GOOGLE_KEY"),
        ("gemini-3.5-flash-lite", "gemini-3.1-flash-lite", "gemini-3.8-flash", "gemma-4-31b-it"),
        "free",
        embed_model="gemini-embedding-001",
        embed_dims=3072,
        context_window=1_048_576,
        free=FreeLimits(
            rpm=15,
            rpd=500,
            tpm=250_000,
            text="per model and project, until midnight Pacific; Flash-Lite 15 RPM and 500 RPD, "
            "Flash 5 RPM and 20 RPD, Gemma 4 30 RPM and 14,400 RPD (users' reports)",
        ),
        trains_on_prompts="yes",
        aliases=("google", "google_ai_studio"),
        state_date="2026-11-10",
        note="2026-11: 2.5 Flash and Pro end 2026-12-01; free prompts train outside EEA, CH, UK.",
        signup="https://aistudio.google.com/app/apikey",
        key_prefix=("AIza",),
    ),
    Provider(
        "openrouter",
        "OpenRouter",
        "https://openrouter.ai/api/v1",
        ("OPENROUTER_API_KEY", "PROVIDER_KEY_OPENROUTER", "EXTERNAL_OPENROUTER_KEY"),
        (
            "nvidia/nemotron-3-ultra-550b-a55b:free",
            "nvidia/nemotron-3.5-super-vl:free",
            "thinkingmachines/inkling-2-small:free",
            "google/gemma-4-31b-it:free",
            "openrouter/free",
        ),
        "free",
        context_window=262_144,
        headers=(
            ("HTTP-Referer", ""),
            ("X-Title", "hermes-router"),
        ),
        free=FreeLimits(
            rpm=20,
            rpd=50,
            text=":free ids share 20 RPM and 50 RPD per account, 1,000 RPD once 10 credits were "
            "bought; more keys do not add quota",
        ),
        trains_on_prompts="yes",
        aliases=("or", "open_router"),
        state_date="2026-11-10",
        note="2026-11: the free pool rotates every month; openrouter/free picks any of it.",
        signup="https://openrouter.ai/keys",
        key_prefix=("sk-or-v1-",),
    ),
    Provider(
        "sambanova",
        "SambaNova Cloud",
        "https://api.sambanova.ai/v1",
        ("SAMBANOVA_API_KEY", "PROVIDER_KEY_SAMBANOVA"),
        ("gpt-oss-120b", "DeepSeek-V3.1", "MiniMax-M2.7"),
        "paid",
        skip_tokens_over=30_000,
        free=FreeLimits(
            rpm=20,
            rpd=20,
            tpd=200_000,
            text="accounts from before 2026-08-19 only; newer ones get 402",
        ),
        aliases=("samba",),
        state="changed",
        state_date="2026-08-19",
        note="2026-08: new accounts need a payment method.",
        signup="https://cloud.sambanova.ai/apis",
    ),
    Provider(
        "github_models",
        "GitHub Models",
        "https://models.github.ai/inference",
        # GITHUB_TOKEN is left out on purpose: it is set for other reasons on many machines.
        ("GITHUB_MODELS_TOKEN", "PROVIDER_KEY_GITHUB_MODELS"),
        (),
        "free",
        skip_tokens_over=6_000,
        max_output_tokens=16_384,
        context_window=128_000,
        free=FreeLimits(text="none, the service is closed"),
        aliases=("github",),
        state="retired",
        state_date="2026-07-30",
        note="2026-07-30: closed for everyone, answers 410.",
        key_prefix=("ghp_", "github_pat_"),
    ),
    Provider(
        "cerebras",
        "Cerebras Inference",
        "https://api.cerebras.ai/v1",
        ("CEREBRAS_API_KEY", "PROVIDER_KEY_CEREBRAS"),
        ("gpt-oss-120b", "qwen-3.8-27b"),
        "trial",
        context_window=131_072,
        free=FreeLimits(
            rpm=5,
            tpm=30_000,
            tpd=1_000_000,
            text="one $5 credit for 30 days, card needed; prompt and max_tokens are reserved first",
        ),
        trains_on_prompts="no",
        state="changed",
        state_date="2026-08-17",
        note="2026-08: the lasting free tier became a $5 trial; context is 65K on it.",
        signup="https://cloud.cerebras.ai",
        key_prefix=("csk-",),
    ),
    Provider(
        "groq",
        "Groq",
        "https://api.groq.com/openai/v1",
        ("GROQ_API_KEY", "PROVIDER_KEY_GROQ", "EXTERNAL_GROK_KEY"),
        ("openai/gpt-oss-120b", "qwen/qwen3.8-27b", "openai/gpt-oss-20b"),
        "free",
        skip_tokens_over=5_500,
        free=FreeLimits(
            rpm=30,
            rpd=1_000,
            tpm=8_000,
            tpd=200_000,
            text="per model and organisation; a request above the TPM gets 413",
        ),
        trains_on_prompts="no",
        state="changed",
        state_date="2026-08-16",
        note="2026-08: the Llama chat models were retired.",
        signup="https://console.groq.com/keys",
        key_prefix=("gsk_",),
    ),
    Provider(
        "mistral",
        "Mistral AI",
        "https://api.mistral.ai/v1",
        ("MISTRAL_API_KEY", "PROVIDER_KEY_MISTRAL"),
        ("mistral-small-latest", "mistral-large-4", "ministral-14b-latest"),
        "free",
        embed_model="mistral-embed",
        embed_dims=1024,
        free=FreeLimits(
            rpm=60,
            tpm=500_000,
            text="$10 of calls a month without a card, about one request a second (disputed)",
        ),
        trains_on_prompts="yes",
        aliases=("mistralai",),
        state_date="2026-11-10",
        note="2026-11: mistral-medium-latest is now the dearest id; Large 4 is better and cheaper.",
        signup="https://console.mistral.ai/api-keys",
    ),
    Provider(
        "cohere",
        "Cohere",
        "https://api.cohere.ai/compatibility/v1",
        ("COHERE_API_KEY", "CO_API_KEY", "PROVIDER_KEY_COHERE"),
        ("command-a-plus-05-2026", "command-a-03-2025", "command-r7b-12-2024"),
        "free",
        embed_model="embed-v4.0",
        embed_dims=1536,
        max_output_tokens=8_192,
        free=FreeLimits(rpm=20, text="trial key: 1,000 calls a month in all, not for business use"),
        state_date="2026-10-08",
        note="2026-10: command-a-plus adds images and long answers.",
        signup="https://dashboard.cohere.com/api-keys",
    ),
    Provider(
        "zai",
        "Z.ai (GLM)",
        "https://api.z.ai/api/paas/v4",
        ("GLM_API_KEY", "ZAI_API_KEY", "ZHIPU_API_KEY", "PROVIDER_KEY_ZAI"),
        ("glm-4.7-flash", "glm-4.6v-flash", "glm-4.5-flash"),
        "free",
        free=FreeLimits(concurrency=1, text="the -flash ids of 4.5 to 4.7, one request at a time"),
        aliases=("glm", "z.ai", "z_ai", "zhipu", "bigmodel"),
        state_date="2026-11-10",
        note="2026-11: glm-4.5-flash is announced to go; 4.7-flash may think 40 s first.",
        signup="https://z.ai/manage-apikey/apikey-list",
    ),
    Provider(
        "naga",
        "NagaAI",
        "https://api.naga.ac/v1",
        ("NAGA_API_KEY", "PROVIDER_KEY_NAGA"),
        (
            "llama-4-scout-17b-16e-instruct:free",
            "llama-3.3-70b-instruct:free",
            "nex-n2.5-mini:free",
        ),
        "free",
        free=FreeLimits(rpd=100, text=":free ids, 100 requests a day per key (unconfirmed)"),
        aliases=("nagaai",),
        state_date="2026-08-02",
        note="2026-08: unofficial aggregator, weak evidence; prefer its own model list.",
        signup="https://naga.ac/dashboard/api-keys",
        key_prefix=("ng-",),
    ),
    Provider(
        "nvidia",
        "NVIDIA NIM",
        "https://integrate.api.nvidia.com/v1",
        ("NVIDIA_API_KEY", "NVIDIA_NIM_KEY", "PROVIDER_KEY_NVIDIA_NIM"),
        (
            "nvidia/nemotron-3-ultra-550b-a55b",
            "nvidia/nemotron-3.5-super-vl-120b-a12b",
            "z-ai/glm-5.3-flash",
            "deepseek-ai/deepseek-v4.1-flash",
            "openai/gpt-oss-20b",
        ),
        "free",
        stream_options=False,  # some of its models hang silently when asked for usage
        free=FreeLimits(rpm=40, rpd=10_000, text="per account, lower in busy hours; for trials"),
        trains_on_prompts="yes",
        aliases=("nvidia_nim", "nim"),
        state_date="2026-11-10",
        note="2026-11: models leave often (404 or 410); cold starts take 30-60 s.",
        signup="https://build.nvidia.com/settings/api-keys",
        key_prefix=("nvapi-",),
    ),
    Provider(
        "huggingface",
        "Hugging Face Inference Providers",
        "https://router.huggingface.co/v1",
        ("HUGGINGFACE_API_KEY", "HUGGINGFACE_API_TOKEN", "HF_TOKEN", "PROVIDER_KEY_HUGGINGFACE"),
        (
            "openai/gpt-oss-120b:cheapest",
            "zai-org/GLM-5.3-Flash:cheapest",
            "deepseek-ai/DeepSeek-V4.1-Flash:cheapest",
        ),
        "trial",
        context_window=131_072,
        free=FreeLimits(text="$0.10 of calls a month (disputed), then 402"),
        aliases=("hf", "hugging_face"),
        state_date="2026-11-10",
        note="2026-11: an id's suffix picks the host (:cheapest, :fastest or a host's name).",
        signup="https://huggingface.co/settings/tokens",
        key_prefix=("hf_",),
    ),
    Provider(
        "kimi",
        "Kimi Code (Moonshot)",
        "https://api.kimi.com/coding/v1",
        ("KIMI_API_KEY", "MOONSHOT_API_KEY", "PROVIDER_KEY_KIMI"),
        ("kimi-for-coding", "k3", "k3.1-pro"),
        "subscription",
        free=FreeLimits(text="the plan's 5-hour and weekly quota"),
        aliases=("moonshot", "moonshotai"),
        state_date="2026-11-10",
        note="2026-11: pay-as-you-go keys belong to https://api.moonshot.ai/v1 and kimi-k3 ids.",
        signup="https://www.kimi.com/code",
        key_prefix=("sk-",),
    ),
    Provider(
        "opencode",
        "OpenCode Zen",
        "https://opencode.ai/zen/v1",
        ("OPENCODE_API_KEY", "OPENCODE_ZEN_API_KEY", "PROVIDER_KEY_OPENCODE"),
        ("glm-5.3-flash", "deepseek-v4.1-flash", "minimax-m3"),
        "paid",
        free=FreeLimits(text="none for API clients: its free ids answer 403 outside OpenCode"),
        aliases=("opencode_zen", "zen"),
        state="changed",
        state_date="2026-09-17",
        note="2026-09: free models closed to other clients; some keys need /inference/openai/v1.",
        signup="https://opencode.ai/auth",
        key_prefix=("sk-",),
    ),
    Provider(
        "opencode_go",
        "OpenCode Go",
        "https://opencode.ai/zen/go/v1",
        # A plain OPENCODE_API_KEY does not enable it: the subscription has a key of its own.
        ("OPENCODE_GO_API_KEY", "PROVIDER_KEY_OPENCODE_GO"),
        ("deepseek-v4.1-flash", "glm-5.3-flash", "minimax-m3.1-flash"),
        "subscription",
        free=FreeLimits(text="$10 a month, spent in 5-hour, weekly and monthly windows"),
        aliases=("opencodego", "go"),
        state="changed",
        state_date="2026-11-10",
        note="2026-11: new model list; some keys need /inference/go/openai/v1.",
        signup="https://opencode.ai/go",
        key_prefix=("sk-",),
    ),
    Provider(
        "openai",
        "OpenAI",
        "https://api.openai.com/v1",
        ("OPENAI_API_KEY", "PROVIDER_KEY_OPENAI", "EXTERNAL_OPENAI_KEY"),
        ("gpt-6-luna", "gpt-6.1-terra", "gpt-5.6-luna"),
        "paid",
        embed_model="text-embedding-3-small",
        embed_dims=1536,
        free=FreeLimits(text="none, prepaid"),
        trains_on_prompts="no",
        aliases=("gpt",),
        state_date="2026-11-10",
        note="2026-11: gpt-4o-mini ends 2027-01-14, gpt-5 and o3 end 2026-12-11.",
        signup="https://platform.openai.com/api-keys",
        key_prefix=("sk-proj-", "sk-"),
    ),
    Provider(
        "anthropic",
        "Anthropic",
        "https://api.anthropic.com/v1",
        ("ANTHROPIC_API_KEY", "PROVIDER_KEY_ANTHROPIC", "EXTERNAL_ANTHROPIC_KEY"),
        ("claude-haiku-5-5", "claude-haiku-4-5", "claude-sonnet-5-5"),
        "paid",
        dialect="messages",
        headers=(("anthropic-version", "2023-06-01"),),
        stream_options=False,  # not part of its dialect; usage always comes
        free=FreeLimits(text="none, prepaid"),
        trains_on_prompts="no",
        aliases=("claude",),
        state_date="2026-11-10",
        note="2026-11: claude-haiku-5-5 costs five times more above 100K prompt tokens.",
        signup="https://platform.claude.com/settings/keys",
        key_prefix=("sk-ant-",),
    ),
    Provider(
        "codex",
        "Codex (ChatGPT plan)",
        "https://chatgpt.com/backend-api/codex",
        (),  # accounts come from auth.json `codex_accounts`
        ("gpt-6.1-terra", "gpt-6-luna", "gpt-5.6-terra"),
        "subscription",
        dialect="codex",
        stream_options=False,  # refuses fields it does not know
        free=FreeLimits(text="the plan's 5-hour and weekly quota"),
        aliases=("chatgpt",),
        state="changed",
        state_date="2026-08-31",
        note="2026-08: gpt-5.5 and older left; proxying a plan may break OpenAI's terms.",
        signup="https://chatgpt.com",
    ),
    Provider(
        "local",
        "Local server (Ollama, LM Studio, llama.cpp, vLLM)",
        "http://localhost:11434/v1",
        ("LOCAL_API_KEY",),
        ("gpt-oss:20b", "qwen3:8b", "llama3.1"),
        "local",
        free=FreeLimits(text="no limit but the machine"),
        trains_on_prompts="no",
        aliases=("ollama", "lmstudio", "lm_studio", "llama.cpp", "llamacpp", "vllm"),
        keyless=True,
        state_date="2026-11-20",
        note="2026-11: what the server lists counts more than these names.",
    ),
    Provider(
        "xai",
        "xAI",
        "https://api.x.ai/v1",
        ("XAI_API_KEY", "PROVIDER_KEY_XAI"),
        ("grok-4.3", "grok-4.7"),
        "paid",
        free=FreeLimits(text="none confirmed"),
        aliases=("x_ai", "x.ai"),
        state_date="2026-11-10",
        note="2026-11: cost doubles above about 200K prompt tokens.",
        signup="https://console.x.ai",
        key_prefix=("xai-",),
    ),
    Provider(
        "deepseek",
        "DeepSeek",
        "https://api.deepseek.com/v1",
        ("DEEPSEEK_API_KEY", "PROVIDER_KEY_DEEPSEEK"),
        ("deepseek-flash", "deepseek-v4-pro"),
        "paid",
        free=FreeLimits(text="none"),
        state="changed",
        state_date="2026-09-10",
        note="2026-09: deepseek-flash replaces -chat and -reasoner; half price off peak.",
        signup="https://platform.deepseek.com/api_keys",
        key_prefix=("sk-",),
    ),
    Provider(
        "together",
        "Together AI",
        "https://api.together.ai/v1",
        ("TOGETHER_API_KEY", "PROVIDER_KEY_TOGETHER"),
        ("openai/gpt-oss-120b", "zai-org/GLM-5.3-Flash", "deepseek-ai/DeepSeek-V4.1-Flash"),
        "paid",
        free=FreeLimits(text="none, $5 is the smallest purchase"),
        aliases=("together_ai", "togetherai"),
        state_date="2026-11-10",
        note="2026-11: knows neither `store` nor the developer role.",
        signup="https://api.together.ai/settings/api-keys",
    ),
    Provider(
        "fireworks",
        "Fireworks AI",
        "https://api.fireworks.ai/inference/v1",
        ("FIREWORKS_API_KEY", "PROVIDER_KEY_FIREWORKS"),
        (
            "accounts/fireworks/models/glm-5p3-flash",
            "accounts/fireworks/models/deepseek-v4p1-flash",
            "accounts/fireworks/models/kimi-k3p1-pro",
        ),
        "trial",
        free=FreeLimits(rpm=10, text="$1 credit; 10 RPM until a payment method is there"),
        trains_on_prompts="no",
        aliases=("fireworks_ai", "fireworksai"),
        state_date="2026-11-10",
        note="2026-11: ids are written with p for the dot (glm-5p3).",
        signup="https://fireworks.ai/account/api-keys",
        key_prefix=("fw_",),
    ),
    Provider(
        "venice",
        "Venice.ai",
        "https://api.venice.ai/api/v1",
        ("VENICE_API_KEY", "PROVIDER_KEY_VENICE", "EXTERNAL_VENICE_KEY"),
        ("z-ai-glm-5-3-flash", "qwen-3-8-flash", "openai-gpt-oss-120b"),
        "paid",
        free=FreeLimits(text="none"),
        trains_on_prompts="no",
        aliases=("venice.ai", "venice_ai"),
        state_date="2026-09-30",
        note="2026-09: a new key's spend limit is 0; 20 failures in 30 s lock it for 30 s.",
        signup="https://venice.ai/settings/api",
    ),
    Provider(
        "cloudflare",
        "Cloudflare Workers AI",
        "https://api.cloudflare.com/client/v4/accounts/{account_id}/ai/v1",
        ("CLOUDFLARE_API_TOKEN", "CLOUDFLARE_API_KEY", "PROVIDER_KEY_CLOUDFLARE"),
        (
            "@cf/openai/gpt-oss-120b",
            "@cf/google/gemma-4-26b-a4b-it",
            "@cf/zai-org/glm-4.7-flash",
            "@cf/meta/llama-3.3-70b-instruct-fp8-fast",
        ),
        "free",
        embed_model="@cf/baai/bge-m3",
        embed_dims=1024,
        free=FreeLimits(rpm=300, text="10,000 neurons a day over all models, until 00:00 UTC"),
        trains_on_prompts="no",
        aliases=("cf", "workers_ai"),
        state_date="2026-11-10",
        note="2026-11: the newest large ids need a paid plan.",
        signup="https://dash.cloudflare.com/profile/api-tokens",
        extra_env=(("account_id", "CLOUDFLARE_ACCOUNT_ID"),),
    ),
    Provider(
        "kilo",
        "Kilo Gateway",
        "https://api.kilo.ai/api/gateway",
        ("KILO_API_KEY", "PROVIDER_KEY_KILO"),
        (
            "kilo-auto/free",
            "nvidia/nemotron-3-ultra-550b-a55b:free",
            "nvidia/nemotron-3.5-lightning:free",
            "dots-studio/dots-3-note-preview:free",
        ),
        "free",
        free=FreeLimits(text=":free ids, 200 requests an hour per address, no key needed"),
        trains_on_prompts="yes",
        aliases=("kilocode", "kilo_code"),
        keyless=True,
        state_date="2026-10-05",
        note="2026-10: prompts to free models are logged; the pool rotates.",
        signup="https://app.kilo.ai/profile",
    ),
    Provider(
        "llm7",
        "LLM7.io",
        "https://api.llm7.io/v1",
        ("LLM7_API_KEY", "PROVIDER_KEY_LLM7"),
        ("gpt-oss:20b", "minimax-m2.7", "DeepSeek-V4-Flash-0731"),
        "free",
        free=FreeLimits(rpm=60, tpd=100_000, text="free token: one request a second, 250 an hour"),
        aliases=("llm7.io",),
        keyless=True,
        state_date="2026-10-05",
        note="2026-08: last seen working without a key; community service, no private data.",
        signup="https://token.llm7.io",
    ),
    Provider(
        "ollama_cloud",
        "Ollama Cloud",
        "https://ollama.com/v1",
        ("OLLAMA_API_KEY", "PROVIDER_KEY_OLLAMA_CLOUD"),
        ("gpt-oss:120b", "gpt-oss:20b", "nemotron-3-super"),
        "free",
        free=FreeLimits(concurrency=1, text="starter credits every month, amount unpublished"),
        trains_on_prompts="no",
        aliases=("ollama.com",),
        state_date="2026-10-08",
        note="2026-10: many listed models answer 403 without a subscription.",
        signup="https://ollama.com/settings/keys",
    ),
    Provider(
        "ovhcloud",
        "OVHcloud AI Endpoints",
        "https://oai.endpoints.kepler.ai.cloud.ovh.net/v1",
        ("OVHCLOUD_API_KEY", "OVH_AI_ENDPOINTS_ACCESS_TOKEN", "PROVIDER_KEY_OVHCLOUD"),
        ("gpt-oss-120b", "Qwen3.8-27B", "Qwen3.5-397B-A17B", "gpt-oss-20b"),
        "free",
        embed_model="bge-m3",
        embed_dims=1024,
        free=FreeLimits(rpm=2, text="without a key 2 RPM per address and model; 400 with a key"),
        trains_on_prompts="no",
        aliases=("ovh",),
        keyless=True,
        state_date="2026-10-08",
        note="2026-10: hosted in the EU, a last resort that needs no key.",
        signup="https://www.ovhcloud.com/en/public-cloud/ai-endpoints/catalog/",
    ),
    Provider(
        "requesty",
        "Requesty",
        "https://router.requesty.ai/v1",
        ("REQUESTY_API_KEY", "PROVIDER_KEY_REQUESTY"),
        (
            "nvidia/nemotron-3-ultra-550b-a55b",
            "google/gemma-4-31b-it",
            "nvidia/nemotron-3.5-lightning-30b-a3b",
        ),
        "free",
        free=FreeLimits(rpd=200, text="200 requests a day over the $0 models, no card"),
        trains_on_prompts="yes",
        state_date="2026-10-05",
        note="2026-10: the $0 models are hosted by NVIDIA and may train on prompts.",
        signup="https://app.requesty.ai/api-keys",
        key_prefix=("rqsty-",),
    ),
    Provider(
        "vercel_ai_gateway",
        "Vercel AI Gateway",
        "https://ai-gateway.vercel.sh/v1",
        ("AI_GATEWAY_API_KEY", "VERCEL_AI_GATEWAY_KEY", "PROVIDER_KEY_VERCEL_AI_GATEWAY"),
        ("openai/gpt-oss-120b", "zai/glm-5.3-flash", "deepseek/deepseek-v4.1-flash"),
        "free",
        free=FreeLimits(text="$5 of calls a month until credits are bought"),
        aliases=("vercel", "ai_gateway"),
        state_date="2026-11-10",
        note="2026-08: when the monthly credit was last confirmed.",
        signup="https://vercel.com/dashboard/ai-gateway",
        key_prefix=("vck_",),
    ),
)

PROVIDERS_BY_NAME = {name: row for row in PROVIDERS for name in (row.name, *row.aliases)}

# What people paste when asked for a base URL; all of it is ours to append.
ENDPOINT_PATHS = ("/chat/completions", "/embeddings", "/messages", "/responses")


def provider_named(name: str) -> Provider | None:
    """The row with this name or alias (any case, `-` = `_`), or None."""
    return PROVIDERS_BY_NAME.get(name.strip().lower().replace("-", "_"))


def normalise_base_url(url: str, known_path: str) -> str:
    """The prefix that endpoint paths are appended to, without a trailing slash.

    A bare host gets `known_path`; a full endpoint loses its last part. Raises ValueError that
    names the problem, never the URL: it may hold a password.
    """
    parts = split_http_url(url)
    path = parts.path.rstrip("/")
    while ending := next((end for end in ENDPOINT_PATHS if path.endswith(end)), ""):
        path = path.removesuffix(ending).rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path or known_path.rstrip('/')}"


def split_http_url(url: str) -> SplitResult:
    """`url` in parts if it is a plain http(s) address; ValueError says what is wrong with it."""
    if any(char.isspace() or not char.isprintable() for char in url):
        raise ValueError("must not hold whitespace or control characters")
    if "\\" in url:
        raise ValueError("must not hold a backslash")
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port  # only looking at it makes the standard library check it
    except ValueError as error:
        raise ValueError(f"is not a URL: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError("must start with http:// or https://")
    if not host:
        raise ValueError("has no host")
    if "@" in parts.netloc:
        raise ValueError("must not hold a user name or password")
    if parts.query or parts.fragment:
        raise ValueError("must end with its path, without ? or #")
    return parts


# =============================================================================
# 3. Models
# =============================================================================

# One line per offer, in the order of PROVIDERS, as of 2026-11-20:
# provider/id, rating 1 (strongest) to 5, window and longest answer in tokens, USD per 1M tokens
# in and out, flags. - is unknown. t tools, v vision, r reasoning, j JSON schema (a ? behind
# the letter: unknown; no letter: no; ? alone: nothing known), e embedding, x retired.
MODELS = """
gemini/gemini-2.5-flash                                 2 1048576   65536    0.3    2.5 tvrj
gemini/gemini-2.5-flash-lite                            3 1048576   65536    0.1    0.4 tvrj
gemini/gemini-2.5-pro                                   1 1048576   65536   1.25     10 tvrj
gemini/gemini-3-flash-preview                           2 1048576   65536    0.5      3 tvrj
gemini/gemini-3.1-flash-lite                            3 1048576   65536   0.25    1.5 tvrj
gemini/gemini-3.1-pro-preview                           1 1048576   65536      2     12 tvrj
gemini/gemini-3.5-flash                                 2 1048576   65536    1.5      9 tvrj
gemini/gemini-3.5-flash-lite                            2 1048576   65536    0.3    2.5 tvrj
gemini/gemini-3.8-flash                                 2 1048576   65536   0.75   3.75 tvrj
gemini/gemini-4-argon                                   1 1048576   32768      2     10 tvrj
gemini/gemini-embedding-001                             5    2048       -   0.15      0 e
gemini/gemini-flash-latest                              2 1048576   65536   0.75   3.75 tvrj
gemini/gemini-flash-lite-latest                         2 1048576   65536    0.3    2.5 tvrj
gemini/gemini-pro-latest                                1 1048576   65536      2     12 tvrj
gemini/gemma-4-26b-a4b-it                               3  262144   32768      0      0 tvrj
gemini/gemma-4-31b-it                                   3  262144   32768      0      0 tvrj
openrouter/anthropic/claude-haiku-5.5                   2 1000000  128000    0.1    0.5 tvrj?
openrouter/anthropic/claude-sonnet-5.5                  1 1000000  128000      2     10 tvrj
openrouter/deepseek/deepseek-v4.1-flash                 2 1048576  943718  0.006    0.5 tvrj
openrouter/google/gemini-3.5-flash-lite                 2 1048576   65536    0.3    2.5 tvrj
openrouter/google/gemini-3.8-flash                      2 1048576   65536  0.825  4.125 tvrj
openrouter/google/gemma-4-26b-a4b-it:free               3  262144   32768      0      0 tvr
openrouter/google/gemma-4-31b-it:free                   3  262144   32768      0      0 tvr
openrouter/nvidia/nemotron-3-super-120b-a12b:free       2  262144  235929      0      0 trjx
openrouter/nvidia/nemotron-3-ultra-550b-a55b:free       1 1000000   65536      0      0 tr
openrouter/nvidia/nemotron-3.5-lightning:free           3 1000000   65536      0      0 tr
openrouter/nvidia/nemotron-3.5-super-vl:free            2 1000000  131072      0      0 tvrj?
openrouter/openai/gpt-6-luna                            2 1050000  128000    0.1    0.5 tvrj
openrouter/openai/gpt-6.1-terra                         1 1050000  128000      1      5 tvrj?
openrouter/openai/gpt-oss-120b                          3  131072   65536   0.15    0.6 trj
openrouter/openrouter/auto                              2 2000000    4096      -      - tvrj
openrouter/openrouter/free                              3  200000    4096      0      0 tvrj
openrouter/thinkingmachines/inkling-2-small:free        2 1048576  131072      0      0 tvrj?
openrouter/z-ai/glm-5.3-flash                           2 1048575  943717   0.15    0.5 tvrj
sambanova/DeepSeek-V3.1                                 2  131072  131072      3    4.5 trj?
sambanova/DeepSeek-V3.2                                 2   32768   32768      3    4.5 tj?
sambanova/gemma-4-31B-it                                3  131072  131072   0.38   1.15 t?vj?
sambanova/gpt-oss-120b                                  3  131072  131072   0.22   0.59 trj?
sambanova/Meta-Llama-3.3-70B-Instruct                   2  131072  131072    0.6    1.2 tj
sambanova/MiniMax-M2.7                                  3  196608  131072    0.6    2.4 trj?
cerebras/gpt-oss-120b                                   3  131072   40960   0.35   0.75 trj
cerebras/qwen-3.8-27b                                   3  131072   40960   0.99   1.49 tvrj
groq/llama-3.1-8b-instant                               3  131072  131072   0.05   0.08 tj?x
groq/llama-3.3-70b-versatile                            2  131072   32768   0.59   0.79 tj?x
groq/openai/gpt-oss-120b                                3  131072   65536   0.15    0.6 trj
groq/openai/gpt-oss-20b                                 4  131072   65536  0.075    0.3 trj
groq/qwen/qwen3.8-27b                                   3  131072   16384    0.8      4 tvrj
mistral/codestral-latest                                4  256000    4096    0.3    0.9 tj
mistral/devstral-latest                                 3  262144  262144    0.4      2 tj
mistral/ministral-14b-latest                            4  262144  262144    0.2    0.2 tvj
mistral/ministral-8b-latest                             5  262144  128000   0.15   0.15 tvj
mistral/mistral-embed                                   5    8192       -    0.1      0 e
mistral/mistral-large-4                                 2 1048576  262144    0.7    2.1 tvrj
mistral/mistral-large-latest                            2  262144  262144    0.5    1.5 tvj
mistral/mistral-medium-3.5                              2  262144  262144    1.5    7.5 tvrj
mistral/mistral-medium-latest                           2  262144  262144    1.5    7.5 tvrj
mistral/mistral-small-latest                            3  262144  256000   0.15    0.6 tvrj
cohere/command-a-03-2025                                2  256000    8000    2.5     10 tj?
cohere/command-a-plus-05-2026                           2  128000   64000    2.5     10 tvrj
cohere/command-r-plus-08-2024                           2  128000    4096    2.5     10 tj?
cohere/command-r7b-12-2024                              4  128000    4096 0.0375   0.15 tj?
cohere/embed-v4.0                                       5  128000       -   0.12      0 e
cohere/north-mini-code-1-0                              3  256000   64000      0      0 trj
zai/glm-4.5                                             3  128000   32000    0.6    2.2 trj?
zai/glm-4.5-flash                                       3  128000   32000      0      0 trj?
zai/glm-4.6                                             2  200000  128000    0.6    2.2 trj?
zai/glm-4.6v-flash                                      4  128000   32768      0      0 tvrj?
zai/glm-4.7                                             2  204800  131072    0.6    2.2 trj?
zai/glm-4.7-flash                                       3  200000  128000      0      0 trj?
zai/glm-5                                               2  200000  128000      1    3.2 trj?
zai/glm-5.2                                             1 1000000  131072    1.4    4.4 trj
zai/glm-5.3                                             1 1000000  131072    1.4    4.4 trj
zai/glm-5.3-flash                                       2 1000000  131072   0.15    0.5 tvrj
naga/llama-3.3-70b-instruct:free                        2  131072       -      0      0 ?
naga/llama-4-scout-17b-16e-instruct:free                2       -       -      0      0 ?
naga/nemotron-3-super-120b-a12b:free                    2  262144       -      0      0 ?
naga/nex-n2.5-mini:free                                 3       -       -      0      0 ?
nvidia/deepseek-ai/deepseek-v4-flash                    2 1048576  393216      0      0 trjx
nvidia/deepseek-ai/deepseek-v4.1-flash                  2 1000000  384000      0      0 tvrj?
nvidia/meta/muse-glimmer-30b                            3  131072  131072      0      0 tvrj
nvidia/minimaxai/minimax-m3.1-flash                     2  262144  262144      0      0 tvrj?
nvidia/moonshotai/kimi-k2.6                             2  262144  262144      0      0 tvrj
nvidia/nvidia/nemotron-3-nano-omni-30b-a3b-reasoning    4  256000   65536      0      0 tvrj
nvidia/nvidia/nemotron-3-ultra-550b-a55b                1 1000000   65536      0      0 trj
nvidia/nvidia/nemotron-3.5-lightning-30b-a3b            3  262144  262144      0      0 trj
nvidia/nvidia/nemotron-3.5-super-vl-120b-a12b           2 1048576    8192      0      0 tvrj?
nvidia/openai/gpt-oss-20b                               4  131072   32768      0      0 trj
nvidia/stepfun-ai/step-5-preview                        2 1048576 1048576      0      0 tvrj?
nvidia/z-ai/glm-5.3-flash                               2 1000000  131072      0      0 tvrj
huggingface/deepseek-ai/DeepSeek-V4.1-Flash:cheapest    2 1048576  384000    0.3    1.2 tvrj
huggingface/openai/gpt-oss-120b:cheapest                3  131072   32768   0.25   0.69 trj
huggingface/zai-org/GLM-5.3-Flash:cheapest              2 1048576  131072   0.15    0.5 tvrj
kimi/k3                                                 1 1048576  131072      0      0 tvrj
kimi/k3.1-pro                                           1 1048576  131072      0      0 tvrj?
kimi/kimi-for-coding                                    3 1048576   32768      0      0 tvrj?
kimi/kimi-k2.6                                          2  262144  262144   0.95      4 tvrj
kimi/kimi-k2.7-code                                     2  262144  262144   0.95      4 tvrj
kimi/kimi-k3                                            1 1048576 1048576      3     15 tvrj
kimi/kimi-k3.1-pro                                      1 1048576 1048576      2     10 tvrj
opencode/big-pickle                                     2  200000   32000      0      0 trj
opencode/deepseek-v4-flash-free                         2  200000  128000      0      0 trjx
opencode/deepseek-v4-pro                                1 1000000  384000   1.74   3.48 trj
opencode/deepseek-v4.1-flash                            2 1000000  384000    0.3    1.2 tvrj
opencode/glm-5.3                                        1 1000000  131072    1.4    4.4 trj
opencode/glm-5.3-flash                                  2 1000000  131072   0.15    0.5 tvrj
opencode/kimi-k3                                        1 1048576  131072      3     15 tvrj
opencode/minimax-m3                                     2  512000  128000    0.3    1.2 tvrj?
opencode/minimax-m3-free                                2  200000   32000      0      0 tvrj?x
opencode/qwen3.6-plus-free                              2  262144   65536      0      0 tvrj?x
opencode_go/deepseek-v4-pro                             1 1000000  384000   0.66   1.98 trj
opencode_go/deepseek-v4.1-flash                         2 1000000  384000   0.15    0.6 tvrj
opencode_go/glm-5.3                                     1 1000000  131072    1.4    4.4 trj
opencode_go/glm-5.3-flash                               2 1000000  131072   0.15    0.5 tvrj
opencode_go/kimi-k2.7-code                              2  262144  262144   0.95      4 tvrj
opencode_go/kimi-k3                                     1 1048576  131072      3     15 tvrj
opencode_go/mimo-v2.6-flash                             3 1048576  131072   0.14   0.28 tvrj?
opencode_go/mimo-v2.6-pro                               2 1048576  131072  0.435   0.87 tvrj?
opencode_go/minimax-m3.1-flash                          2 1000000  512000   0.15    0.6 tvrj?
openai/gpt-3.5-turbo                                    5   16385    4096    0.5    1.5 tx
openai/gpt-4-turbo                                      4  128000    4096     10     30 tvx
openai/gpt-4.1                                          3 1047576   32768      2      8 tvj
openai/gpt-4.1-mini                                     4 1047576   32768    0.4    1.6 tvj
openai/gpt-4.1-nano                                     4 1047576   32768    0.1    0.4 tvjx
openai/gpt-4o                                           1  128000   16384    2.5     10 tvj
openai/gpt-4o-mini                                      3  128000   16384   0.15    0.6 tvj
openai/gpt-5                                            1  400000  128000   1.25     10 tvrj
openai/gpt-5-mini                                       3  400000  128000   0.25      2 tvrj
openai/gpt-5-nano                                       4  400000  128000   0.05    0.4 tvrj
openai/gpt-5.4                                          1 1050000  128000    2.5     15 tvrj
openai/gpt-5.4-mini                                     3  400000  128000   0.75    4.5 tvrj
openai/gpt-5.4-nano                                     4  400000  128000    0.2   1.25 tvrj
openai/gpt-5.5                                          1 1050000  128000      5     30 tvrj
openai/gpt-5.6-luna                                     2 1050000  128000    0.2    1.2 tvrj
openai/gpt-5.6-sol                                      1 1050000  128000      4     20 tvrj
openai/gpt-5.6-terra                                    1 1050000  128000      2     12 tvrj
openai/gpt-6-astra                                      1 1050000  128000     10     50 tvrj
openai/gpt-6-luna                                       2 1050000  128000    0.1    0.5 tvrj
openai/gpt-6-sol                                        1 1050000  128000      2     10 tvrj
openai/gpt-6.1-sol                                      1 1050000  128000      2     10 tvrj
openai/gpt-6.1-terra                                    1 1050000  128000      1      5 tvrj
openai/o1                                               1  200000  100000     15     60 tvrjx
openai/o1-mini                                          3  128000   65536    1.1    4.4 rx
openai/o3                                               1  200000  100000      2      8 tvrj
openai/o3-mini                                          3  200000  100000    1.1    4.4 trjx
openai/o4-mini                                          3  200000  100000    1.1    4.4 tvrjx
openai/text-embedding-3-large                           5    8191       -   0.13      0 e
openai/text-embedding-3-small                           5    8191       -   0.02      0 e
anthropic/claude-3-5-haiku-latest                       2  200000    8192    0.8      4 tx
anthropic/claude-fable-5-2                              1 1000000  128000      8     40 tvrj?
anthropic/claude-haiku-4-5                              3  200000   64000      1      5 tvrj
anthropic/claude-haiku-4-5-20251001                     3  200000   64000      1      5 tvrj
anthropic/claude-haiku-5-5                              2 1000000  128000    0.1    0.5 tvrj
anthropic/claude-opus-4-1                               1  200000   32000     15     75 tvr
anthropic/claude-opus-4-5                               1  200000   64000      5     25 tvrj
anthropic/claude-opus-4-7                               1 1000000  128000      5     25 tvrj
anthropic/claude-opus-4-8                               1 1000000  128000      5     25 tvrj
anthropic/claude-opus-5                                 1 1000000  128000      5     25 tvrj
anthropic/claude-opus-5-5                               1 1000000  128000      4     20 tvrj
anthropic/claude-sonnet-4-5                             2  200000   64000      3     15 tvrj
anthropic/claude-sonnet-4-6                             2 1000000  128000      3     15 tvrj
anthropic/claude-sonnet-5                               1 1000000  128000      2     10 tvrj
anthropic/claude-sonnet-5-5                             1 1000000  128000      2     10 tvrj
codex/gpt-5.5                                           1 1050000  128000      0      0 tvrjx
codex/gpt-5.6-luna                                      2  272000  128000      0      0 tvrj
codex/gpt-5.6-sol                                       1  272000  128000      0      0 tvrj
codex/gpt-5.6-terra                                     1  272000  128000      0      0 tvrj
codex/gpt-6-astra                                       1  272000  128000      0      0 tvrj
codex/gpt-6-luna                                        2  272000  128000      0      0 tvrj
codex/gpt-6-sol                                         1  272000  128000      0      0 tvrj
codex/gpt-6.1-sol                                       1  500000  128000      0      0 tvrj
codex/gpt-6.1-terra                                     1  500000  128000      0      0 tvrj
local/gpt-oss:120b                                      3  131072       -      0      0 trj?
local/gpt-oss:20b                                       4  131072       -      0      0 trj?
local/llama3.1                                          3  131072       -      0      0 tj?
local/nomic-embed-text                                  5    8192       -      0      0 j?e
local/qwen3:8b                                          3   40960       -      0      0 trj?
xai/grok-4.3                                            2 1000000   30000   1.25    2.5 tvrj
xai/grok-4.5                                            1  500000  500000      2      6 tvrj
xai/grok-4.6                                            1  500000  500000      2      6 tvrj
xai/grok-4.7                                            1  500000  500000      2      6 tvrj
xai/grok-build-0.1                                      3  256000  256000      1      2 tvrj
deepseek/deepseek-chat                                  3  131072    8192   0.27    1.1 tjx
deepseek/deepseek-flash                                 2 1000000  384000    0.3    1.2 tvrj
deepseek/deepseek-reasoner                              3  131072   65536   0.55   2.19 t?rjx
deepseek/deepseek-v4-pro                                1 1000000  384000   1.32   3.96 trj
together/deepseek-ai/DeepSeek-V4.1-Flash                2 1048576  384000    0.3    1.2 tvrj
together/openai/gpt-oss-120b                            3  131072  131072   0.15    0.6 trj
together/zai-org/GLM-5.3-Flash                          2 1048575  400000   0.15    0.5 tvrj
fireworks/accounts/fireworks/models/deepseek-v4p1-flash 2 1000000  384000    0.3    1.2 tvrj
fireworks/accounts/fireworks/models/glm-5p3-flash       2 1048573  131072   0.15    0.5 tvrj
fireworks/accounts/fireworks/models/kimi-k3p1-pro       1 1048576  131072      2     10 tvrj?
venice/openai-gpt-oss-120b                              3  128000   16384   0.07    0.3 trj
venice/qwen-3-8-flash                                   2 1000000  131072   0.14   0.49 tvrj
venice/z-ai-glm-5-3-flash                               2 1048576  131072   0.15    0.5 tvrj
cloudflare/@cf/baai/bge-m3                              5    8192       -      0      0 j?e
cloudflare/@cf/google/gemma-4-26b-a4b-it                3  256000   16384    0.1    0.3 tvrj
cloudflare/@cf/meta/llama-3.3-70b-instruct-fp8-fast     2   24000   24000  0.293  2.253 t
cloudflare/@cf/meta/llama-4-scout-17b-16e-instruct      2  131000   16384   0.27   0.85 tv
cloudflare/@cf/nvidia/nemotron-3-120b-a12b              2  256000  256000    0.5    1.5 trj
cloudflare/@cf/openai/gpt-oss-120b                      3  128000   16384   0.35   0.75 trj
cloudflare/@cf/openai/gpt-oss-20b                       4  128000   16384    0.2    0.3 trj
cloudflare/@cf/qwen/qwen3.8-27b                         3  262144  262144   0.45    3.2 tvrj
cloudflare/@cf/zai-org/glm-4.7-flash                    3  131072  131072   0.06    0.4 trj
kilo/dots-studio/dots-3-note-preview:free               3  512000  460800      0      0 tvrj
kilo/kilo-auto/free                                     3  256000   32768      0      0 tr
kilo/nvidia/nemotron-3-ultra-550b-a55b:free             1 1000000   65536      0      0 tr
kilo/nvidia/nemotron-3.5-lightning:free                 3 1000000   65536      0      0 tr
llm7/DeepSeek-V4-Flash-0731                             2  400000       -      0      0 t?rj?
llm7/gpt-oss:20b                                        4  128000       -      0      0 trj?
llm7/minimax-m2.7                                       3  180000       -      0      0 t?rj?
ollama_cloud/gemma4:31b                                 3  262144  262144   0.14    0.4 tvrj?
ollama_cloud/gpt-oss:120b                               3  131072   32768   0.15    0.6 trj?
ollama_cloud/gpt-oss:20b                                4  131072   32768   0.07    0.3 trj?
ollama_cloud/nemotron-3-super                           2  262144   65536  0.015    0.6 trj?
ovhcloud/bge-m3                                         5    8192       -   0.01      0 j?e
ovhcloud/gpt-oss-120b                                   3  131000  131000   0.09   0.47 trj
ovhcloud/gpt-oss-20b                                    4  131000  131000   0.05   0.18 trj
ovhcloud/Qwen3.5-397B-A17B                              2  262144  262144   0.71   4.25 tvrj
ovhcloud/Qwen3.8-27B                                    3  262144  262144   0.47   3.19 tvrj
requesty/google/gemma-4-31b-it                          3  262144    8192      0      0 tvrj?
requesty/nvidia/nemotron-3-ultra-550b-a55b              1 1048576   65536      0      0 trj?
requesty/nvidia/nemotron-3.5-lightning-30b-a3b          3 1048576   65536      0      0 trj?
vercel_ai_gateway/deepseek/deepseek-v4.1-flash          2 1048576   32768    0.3    1.2 tvrj
vercel_ai_gateway/openai/gpt-oss-120b                   3  131072  131072    0.1    0.5 trj
vercel_ai_gateway/zai/glm-5.3-flash                     2 1000000  131000   0.15    0.5 tvrj
"""

# What each family is worth, 1 (strongest) to 5, as of 2026-11. The longest match wins, so a row
# only has to be right about what no longer row covers. Spelled as `spelled` spells ids; a
# leading / ties a row to the start of the name: marco-o1 is not o1.
RATINGS = (
    # OpenAI
    ("/-o1", 1), ("/-o1-mini", 3), ("/-o3", 1), ("/-o3-mini", 3), ("/-o4-mini", 3),
    ("gpt-3-5", 5), ("gpt-4", 3), ("gpt-4-1-nano", 4), ("gpt-4-5", 1), ("gpt-4o", 1),
    ("gpt-4o-mini", 3), ("gpt-5", 1), ("gpt-5-mini", 3), ("gpt-5-nano", 4), ("gpt-5-codex", 1),
    ("gpt-5-3-codex", 1), ("gpt-5-4-mini", 3), ("gpt-5-4-nano", 4), ("gpt-5-5", 1),
    ("gpt-5-6-luna", 2), ("gpt-6", 1), ("gpt-6-luna", 2), ("gpt-6-mini", 3), ("gpt-6-nano", 4),
    ("gpt-oss-120b", 3), ("gpt-oss-20b", 4), ("gpt-oss-safeguard-20b", 4),
    # Anthropic
    ("claude-3-5", 2), ("claude-3-7", 1), ("claude-opus", 1), ("claude-opus-4", 1),
    ("claude-sonnet", 2), ("claude-sonnet-5", 1), ("claude-haiku", 3), ("claude-haiku-5", 2),
    ("claude-fable", 1),
    # Google
    ("gemini-1-5-flash", 3), ("gemini-2-0-flash", 2), ("gemini-2-0-ultra", 1),
    ("gemini-2-5-pro", 1), ("gemini-2-5-flash", 2), ("gemini-2-5-flash-lite", 3),
    ("gemini-3", 2), ("gemini-3-1-pro", 1), ("gemini-3-1-flash-lite", 3), ("gemini-4", 1),
    ("gemini-4-flash", 2), ("gemini-pro-latest", 1), ("gemini-flash", 2),
    ("gemma-2", 5), ("gemma-3", 4), ("gemma-3-1b", 5), ("gemma-3-4b", 5), ("gemma-4", 3),
    # Meta
    ("llama-3-1-8b-instant", 3), ("llama-3-1-70b", 2), ("llama-3-1-405b", 1),
    ("llama-3-2-3b", 4), ("llama-3-3-70b", 2), ("llama-4-maverick", 2), ("llama-4-scout", 2),
    ("muse-spark", 1), ("muse-ember", 2),
    # Mistral and Cohere
    ("mistral-7b", 4), ("mixtral-8x7b", 3), ("mixtral-8x22b", 2), ("mistral-small", 3),
    ("mistral-medium", 2), ("mistral-large", 2), ("magistral-medium", 3), ("devstral", 3),
    ("codestral", 4), ("ministral", 5), ("ministral-14b", 4), ("mistral-nemo", 5),
    ("command-a", 2), ("command-r", 4), ("command-r-plus", 2), ("command-r7b", 4),
    # NVIDIA
    ("nemotron", 2), ("nemotron-nano", 4), ("nemotron-3-nano", 4), ("nemotron-3-super", 2),
    ("nemotron-3-ultra", 1), ("nemotron-3-5-lightning", 3), ("nemotron-3-5-super", 2),
    ("nemotron-70b", 4), ("nemotron-ultra-253b", 3),
    # DeepSeek
    ("deepseek-chat", 3), ("deepseek-reasoner", 3), ("deepseek-flash", 2), ("deepseek-v2", 2),
    ("deepseek-v3", 2), ("deepseek-v4", 2), ("deepseek-v4-flash", 2), ("deepseek-v4-pro", 1),
    ("deepseek-r1", 2), ("deepseek-r1-distill", 4), ("deepseek-r2", 1),
    # Alibaba
    ("qwen-2-5-7b", 4), ("qwen-2-5-32b", 3), ("qwen-2-5-72b", 2), ("qwen-72b", 2),
    ("qwen-3-4b", 4), ("qwen-3-8b", 3), ("qwen-3-14b", 3), ("qwen-3-32b", 2), ("qwen-3-72b", 1),
    ("qwen-3-235b", 1), ("qwen-3-5-397b", 2), ("qwen-3-8-flash", 2),
    # Z.ai, Moonshot, MiniMax
    ("glm-4", 3), ("glm-4-5-flash", 3), ("glm-4-6", 2), ("glm-4-7", 2), ("glm-4-7-flash", 3),
    ("glm-5", 2), ("glm-5-2", 1), ("glm-5-3", 1), ("glm-5-3-flash", 2),
    ("kimi-for-coding", 3), ("kimi-k2", 2), ("kimi-k3", 1), ("/-k3", 1), ("moonshot-v1", 2),
    ("minimax", 2), ("minimax-m2", 3), ("minimax-m3", 2),
    # xAI and others
    ("grok-2", 2), ("grok-4", 2), ("grok-4-5", 1), ("grok-4-6", 1), ("grok-4-7", 1),
    ("big-pickle", 2), ("inkling", 2), ("longcat", 2), ("mimo", 3), ("mimo-v2-6-pro", 2),
    ("phi-3-mini", 4), ("phi-3-medium", 3), ("phi-3-5", 3), ("phi-3-5-mini", 4), ("phi-4", 2),
    ("phi-4-mini", 4), ("phi-4-reasoning", 2), ("wizardlm-2-7b", 3), ("wizardlm-2-8x22b", 2),
    ("yi-large", 2), ("yi-medium", 3), ("yi-mini", 4), ("yi-6b", 3),
)  # fmt: skip

# Billions of parameters in all, largest first: at least this many is worth this.
SIZE_RATINGS = ((200, 1), (60, 2), (14, 3), (3, 4), (0, 5))

# What a name says of itself when neither family nor size is known; the humblest word counts.
WORD_RATINGS = {
    "ultra": 1, "opus": 1, "max": 1,
    "pro": 2, "plus": 2, "large": 2, "sonnet": 2, "turbo": 2, "super": 2,
    "flash": 3, "small": 3, "mini": 3, "medium": 3,
    "lite": 4, "nano": 4, "micro": 5, "tiny": 5,
}  # fmt: skip

# Families that take images, spelled like RATINGS; used for ids without a row.
VISION_FAMILIES = (
    "gemini", "gpt-4o", "gpt-4-1", "gpt-4-turbo", "gpt-5", "gpt-6", "/-o1", "/-o3",
    "claude", "pixtral", "llava", "vl", "llama-4", "grok", "vision", "gemma-4",
)  # fmt: skip

RATING_LABELS = {1: "Outstanding", 2: "Best", 3: "Good", 4: "Fair", 5: "Basic"}

# `:free` picks an offer and `:cheapest` a host; `:20b` is part of the name.
OFFER_SUFFIX = re.compile(r"(?::[a-z][a-z0-9_-]*|-free)$")
DATE_SUFFIX = re.compile(r"-(?:latest|\d{4}-\d{2}-\d{2}|\d{2}-\d{4}|\d{8}|\d{6}|\d{4})$")
FREE_ID = re.compile(r"(?::free|-free)$|/free(?:/|$)")
SIZE = re.compile(r"(?<![a-z0-9.])(?:(\d{1,4})x)?(\d{1,6}(?:\.\d{1,6})?)([bt])(?![a-z0-9])")
POINT_AS_P = re.compile(r"(?<=\d)p(?=\d)")  # Fireworks: glm-5p3
NOT_WORD = re.compile(r"[^a-z0-9]+")
WORD_THEN_DIGIT = re.compile(r"(?<=[a-z]{3})(?=\d)")  # qwen3 = qwen-3, but o3 and v4 stay

MEMO_SIZE = 4096  # model ids remembered per ModelFacts; callers choose ids, so there is a limit


@dataclass(frozen=True, slots=True)
class Model:
    """What is known of one model at one provider; None = unknown, never "no"."""

    provider: str
    id: str
    rating: int  # 1 strongest .. 5
    window: int | None = None  # tokens of prompt and answer together
    max_output: int | None = None  # tokens
    price_in: float | None = None  # USD per 1M tokens, standard list price
    price_out: float | None = None
    tools: bool | None = None
    vision: bool | None = None
    reasoning: bool | None = None
    json_schema: bool | None = None
    embedding: bool = False
    retired: bool = False


class ModelFacts:
    """Looks up models: overrides first, then MODELS, then what the name gives away."""

    def __init__(self, overrides: Mapping[str, Mapping[str, object]] | None = None) -> None:
        """`overrides` is keyed "provider/id" or "id"; ValueError names a bad key and field."""
        rows = {} if overrides is None else overrides
        if not isinstance(rows, Mapping):
            raise ValueError("model overrides: must be an object keyed by model id")
        self._overrides = {key.lower(): checked_override(key, row) for key, row in rows.items()}
        self._exact: dict[tuple[str, str], Model] = {}
        self._by_id: dict[str, Model] = {}
        self._by_family: dict[str, Model] = {}
        # Makers name their models without a vendor prefix; their row speaks for the model.
        for model in sorted(model_rows(), key=lambda row: "/" in row.id):
            low = model.id.lower()
            self._exact[model.provider, low] = model
            self._by_id.setdefault(low, model)
            self._by_family.setdefault(family(low), model)
        # Reads and writes of one entry are atomic; two threads at worst derive the same row.
        self._memo: dict[tuple[str, str], Model] = {}

    def facts(self, provider: str, id: str) -> Model:
        """Everything known about `id` at `provider`; always an answer, quick when asked again."""
        key = (provider, id)
        model = self._memo.get(key)
        if model is None:
            if len(self._memo) >= MEMO_SIZE:
                self._memo.clear()
            model = self._memo[key] = self._overridden(self._look_up(provider, id))
        return model

    def _look_up(self, provider: str, id: str) -> Model:
        low = id.lower()
        if model := self._exact.get((provider, low)):
            return replace(model, id=id)
        if model := self._by_id.get(low) or self._by_family.get(family(low)):
            # A price and a retirement belong to one provider's offer, not to the model.
            model = replace(
                model, provider=provider, id=id, price_in=None, price_out=None, retired=False
            )
        else:
            model = Model(provider, id, rate_model(id), vision=sees_images(id))
        if is_free_id(id):
            model = replace(model, price_in=0.0, price_out=0.0)
        return model

    def _overridden(self, model: Model) -> Model:
        for key in (model.id.lower(), f"{model.provider}/{model.id}".lower()):
            if fields := self._overrides.get(key):
                model = replace(model, **fields)
        return model


def model_rows() -> Iterator[Model]:
    """The rows of MODELS. Price and size columns: - is unknown."""
    for line in MODELS.strip().splitlines():
        name, rating, window, max_output, price_in, price_out, flags = line.split()
        provider, _, id = name.partition("/")
        yield Model(
            provider,
            id,
            int(rating),
            None if window == "-" else int(window),
            None if max_output == "-" else int(max_output),
            None if price_in == "-" else float(price_in),
            None if price_out == "-" else float(price_out),
            flag(flags, "t"),
            flag(flags, "v"),
            flag(flags, "r"),
            flag(flags, "j"),
            "e" in flags,
            "x" in flags,
        )


def flag(flags: str, letter: str) -> bool | None:
    """Whether `letter` is among `flags`; None where nothing or not this is known."""
    return None if flags == "?" or f"{letter}?" in flags else letter in flags


def rate_model(id: str) -> int:
    """How strong `id` probably is, 1 (strongest) to 5: by family, else size, else its words."""
    name = spelled(id)
    if known := [(len(words), rating) for words, rating in RATINGS if f"-{words}-" in name]:
        return max(known)[1]
    if sizes := parameter_counts(id):
        return next(rating for least, rating in SIZE_RATINGS if max(sizes) >= least)
    return max((WORD_RATINGS.get(word, 0) for word in name.split("-")), default=0) or 3


def sees_images(id: str) -> bool:
    """Whether the name belongs to a family that takes images."""
    name = spelled(id)
    return "embed" not in name and any(f"-{words}-" in name for words in VISION_FAMILIES)


def is_free_id(id: str) -> bool:
    """Whether the id itself says it costs nothing: `x:free`, `x-free`, `x/free`."""
    return FREE_ID.search(id.lower()) is not None


def spelled(id: str) -> str:
    """One spelling for all, whole words between dashes: `-qwen-/-qwen-3-8-27b-`."""
    vendor, _, name = POINT_AS_P.sub(".", id.lower()).rpartition("/")
    return f"-{dashed(vendor)}-/-{dashed(name)}-"


def dashed(words: str) -> str:
    return WORD_THEN_DIGIT.sub("-", NOT_WORD.sub("-", words)).strip("-")


def family(id: str) -> str:
    """`id` spelled without vendor, offer and date: the same for one model at many providers."""
    name = OFFER_SUFFIX.sub("", id.lower().rpartition("/")[2])
    return spelled(DATE_SUFFIX.sub("", name))


def parameter_counts(id: str) -> list[float]:
    """Every parameter count in the name, in billions: 8x22b is 176, 2.4t is 2400."""
    found = SIZE.findall(POINT_AS_P.sub(".", id.lower()).replace("_", "-"))
    return [float(n or 1) * float(size) * (1000 if unit == "t" else 1) for n, size, unit in found]


def is_rating(value: object) -> bool:
    return type(value) is int and 1 <= value <= 5


def is_tokens(value: object) -> bool:
    return value is None or (type(value) is int and value > 0)


def is_price(value: object) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= cast(float, value) < math.inf)


def is_answer(value: object) -> bool:
    return value is None or type(value) is bool


def is_flag(value: object) -> bool:
    return type(value) is bool


# field of Model -> what an override may say
OVERRIDE_CHECKS: Mapping[str, Callable[[object], bool]] = {
    "rating": is_rating,
    "window": is_tokens,
    "max_output": is_tokens,
    "price_in": is_price,
    "price_out": is_price,
    "tools": is_answer,
    "vision": is_answer,
    "reasoning": is_answer,
    "json_schema": is_answer,
    "embedding": is_flag,
    "retired": is_flag,
}


def checked_override(key: str, row: Mapping[str, object]) -> dict[str, Any]:
    """`row` as keyword arguments for Model; ValueError names the key and the bad field."""
    if not isinstance(row, Mapping):
        raise ValueError(f"model override {key!r}: must be an object of fields")
    for name, value in row.items():
        check = OVERRIDE_CHECKS.get(name)
        if check is None:
            raise ValueError(f"model override {key!r}: unknown field {name!r}")
        if not check(value):
            raise ValueError(f"model override {key!r}: field {name!r} cannot be {value!r}")
    return dict(row)


# =============================================================================
# 4. Config
# =============================================================================

PLACEHOLDER_KEYS: Final = frozenset({"sk-router-1", "sk-my-router-key-1"})
FALSE_WORDS: Final = frozenset({"", "0", "false", "no", "off"})
LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})


def setting(default: Any, env: str, group: str, help: str, **extra: Any) -> Any:
    """One row of the settings table; the field's annotation says how the text is read.

    `also` names older variables that are read when `env` is unset, `low`/`high` bound a
    number, `choices` lists the words allowed.
    """
    shown = not extra.get("secret", False)
    row = {"env": env, "group": group, "help": help, **extra}
    return field(default=default, repr=shown, metadata=row)


@dataclass(frozen=True)
class Service:
    """A provider as configured here: where it is, its keys, its models, its overrides."""

    provider: Provider
    url: str
    keys: tuple[str, ...] = field(repr=False)
    key_sources: tuple[str, ...]
    models: tuple[str, ...]
    embed_model: str = ""
    skip_tokens_over: int = 0
    max_output_tokens: int = 0
    tools: Mapping[str, bool] = field(default_factory=dict)  # by model, "" = every model
    reasoning: Mapping[str, bool] = field(default_factory=dict)
    headers: tuple[tuple[str, str], ...] = ()
    resting: str = ""  # why it is never tried: retired, or nothing left of its models

    @property
    def name(self) -> str:
        return self.provider.name


@dataclass(frozen=True)
class Config:
    """Every setting. `from_env` is the only reader of the environment."""

    host: str = setting("127.0.0.1", "HOST", "Server", "address to bind; 0.0.0.0 = every interface")
    port: int = setting(8319, "PORT", "Server", "port to listen on; 0 = any free one", high=65535)
    proxy_keys: tuple[str, ...] = setting(
        (),
        "PROXY_API_KEYS",
        "Access",
        "keys that callers may use, comma list; one is generated at the first start",
        also=("ROUTER_SHARED_SECRET", "IIR_API_KEY"),
        secret=True,
    )
    auth_mode: str = setting(
        "keys",
        "AUTH_MODE",
        "Access",
        "`open` lets anybody in, allowed on a loopback HOST only",
        choices=("keys", "open"),
    )
    metrics_require_auth: bool = setting(
        False, "METRICS_REQUIRE_AUTH", "Access", "1 = /metrics needs a key"
    )
    log_level: str = setting(
        "INFO",
        "LOG_LEVEL",
        "Server",
        "DEBUG, INFO, WARNING or ERROR",
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
        upper=True,
    )
    auth_file: str = setting(
        "auth.json", "ROUTER_AUTH_FILE", "Files", "JSON file with provider keys (HR_HOME)"
    )
    models_file: str = setting(
        "models.json", "MODELS_FILE", "Files", "JSON file that adds or overrides model rows"
    )
    max_request_bytes: int = setting(
        10_485_760, "MAX_REQUEST_BYTES", "Server", "larger request bodies get 413", low=1024
    )
    worker_threads: int = setting(
        16,
        "WORKER_THREADS",
        "Server",
        "threads kept when idle; more start on demand",
        low=1,
        high=512,
    )
    max_streams: int = setting(
        1000,
        "MAX_STREAMS",
        "Server",
        "requests in flight at once; beyond it 503",
        low=1,
        high=10_000,
    )
    connect_timeout: float = setting(
        10.0, "CONNECT_TIMEOUT", "Timeouts", "seconds to reach a provider", low=0.01
    )
    ttft_timeout: float = setting(
        60.0,
        "TTFT_TIMEOUT",
        "Timeouts",
        "seconds until the first useful event of a stream; a whole answer gets three times as long",
        low=0.01,
    )
    stream_idle_timeout: float = setting(
        120.0, "STREAM_IDLE_TIMEOUT", "Timeouts", "seconds of silence inside a stream", low=0.01
    )
    request_deadline: float = setting(
        600.0,
        "REQUEST_DEADLINE",
        "Timeouts",
        "seconds one request may take in all",
        low=0.01,
        also=("UPSTREAM_TIMEOUT",),
    )
    router_model_id: str = setting(
        "hermes-router", "ROUTER_MODEL_ID", "Routing", "model id that means: the router chooses"
    )
    model_aliases: tuple[str, ...] = setting(
        (),
        "MODEL_ALIASES",
        "Routing",
        "comma list of pattern=provider/model, for example *haiku*=groq/openai/gpt-oss-20b",
    )
    strict_model: bool = setting(
        False,
        "STRICT_MODEL",
        "Routing",
        "1 = an unknown or failing model id never falls back to others",
    )
    rotation_mode: str = setting(
        "round-robin",
        "ROTATION_MODE",
        "Routing",
        "order of a provider's keys; sequential = the first ready one",
        choices=("round-robin", "sequential"),
        lenient=True,
    )
    route_prefer: str = setting(
        "fit",
        "ROUTE_PREFER",
        "Routing",
        "`fit` = nearest capability first, `price` = cheapest capable first",
        choices=("fit", "price"),
    )
    fast_route_threshold: int = setting(
        0,
        "FAST_ROUTE_THRESHOLD",
        "Routing",
        "below so many tokens fast providers win ties; 0 = off",
    )
    reasoning_reserve: int = setting(
        4096,
        "REASONING_TOKEN_RESERVE",
        "Routing",
        "tokens added to a request's max_tokens for reasoning models; 0 = none",
    )
    echo_fallback: bool = setting(
        True, "ECHO_FALLBACK", "Routing", "without any provider the built-in echo answers; 0 = 503"
    )
    models_list: str = setting(
        "all",
        "MODELS_LIST",
        "Routing",
        "`router` hides provider/model ids from /v1/models",
        choices=("all", "router"),
    )
    breaker_window: int = setting(
        8, "BREAKER_WINDOW", "Breaker", "latest outcomes of a provider looked at", low=1, high=1000
    )
    breaker_min_samples: int = setting(
        4, "BREAKER_MIN_SAMPLES", "Breaker", "outcomes needed before it may open", low=1
    )
    breaker_error_rate: float = setting(
        0.5, "BREAKER_ERROR_RATE", "Breaker", "share of failures that opens it", high=1
    )
    breaker_cooldown: float = setting(
        60.0, "BREAKER_COOLDOWN", "Breaker", "seconds it stays open before one probe"
    )
    services: tuple[Service, ...] = ()
    key_scopes: Mapping[str, frozenset[str]] = field(default_factory=dict, repr=False)
    model_overrides: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    home: Path = Path(".")
    env_file: Path = Path(".env")
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Config:
        """Read `env` (the process environment by default), HR_HOME/.env and auth.json.

        Raises ConfigError naming every setting that cannot be used.
        """
        given = os.environ if env is None else env
        home = Path(given.get("HR_HOME") or Path(__file__).resolve().parent).expanduser()
        env_file = home / Path(given.get("HR_ENV_FILE") or ".env").expanduser()
        reader = SettingsReader({**read_dotenv(env_file), **given})
        values = {f.name: reader.value(f) for f in fields(cls) if "env" in f.metadata}
        auth = reader.document(home / Path(values["auth_file"]).expanduser())
        overrides = reader.document(home / Path(values["models_file"]).expanduser())
        services = read_services(reader, auth, values["port"])
        scopes = read_key_scopes(auth)
        values["proxy_keys"] = tuple(
            dict.fromkeys(k for k in (*values["proxy_keys"], *scopes) if k not in PLACEHOLDER_KEYS)
        )
        if values["auth_mode"] == "open" and values["host"] not in LOOPBACK:
            reader.problems.append("AUTH_MODE=open needs a loopback HOST (127.0.0.1)")
        reader.warnings += [
            f"MODEL_ALIASES: {row!r} is not pattern=provider/model"
            for row in values["model_aliases"]
            if "=" not in row
        ]
        reader.check_overrides(overrides)
        if reader.problems:
            raise ConfigError(reader.problems)
        return cls(
            **values,
            services=services,
            key_scopes=MappingProxyType(scopes),
            model_overrides=MappingProxyType(overrides),
            home=home,
            env_file=env_file,
            warnings=tuple(reader.warnings),
        )


def read_dotenv(path: Path) -> dict[str, str]:
    """KEY=VALUE lines of a .env file; a missing file is an empty one."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ConfigError([f"{path.name} cannot be read: {error.strerror}"]) from error
    pairs = (parse_dotenv_line(line) for line in text.splitlines())
    return dict(pair for pair in pairs if pair)


def parse_dotenv_line(line: str) -> tuple[str, str] | None:
    """`export KEY="value" # why` gives ("KEY", "value"); None for blank and comment lines."""
    name, equals, value = line.strip().removeprefix("export ").partition("=")
    name, value = name.strip(), value.strip()
    if not equals or name.startswith("#") or not name:
        return None
    if value[:1] in {"'", '"'}:
        end = value.find(value[0], 1)
        return name, value[1:end] if end > 0 else value[1:]
    return name, re.split(r"(?:^|\s)#", value, maxsplit=1)[0].strip()


class SettingsReader:
    """Turns texts into typed values; collects what is wrong instead of stopping at the first."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.env = env
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def text(self, *names: str) -> str | None:
        """The first of `names` that is set to something."""
        return next((self.env[n].strip() for n in names if self.env.get(n, "").strip()), None)

    def value(self, row: Any) -> Any:
        """The value of one settings row, or its default with a problem noted."""
        meta = row.metadata
        names = (meta["env"], *meta.get("also", ()))
        if isinstance(row.default, tuple):
            return tuple(
                dict.fromkeys(itertools.chain(*(split_list(self.env.get(n)) for n in names)))
            )
        text = self.text(*names)
        if text is None:
            return (
                self.flag(meta["env"], row.default)
                if isinstance(row.default, bool)
                else row.default
            )
        try:
            return self.convert(text, row.default, meta)
        except ValueError as error:
            note = self.warnings if meta.get("lenient") else self.problems
            name = next(n for n in names if self.env.get(n, "").strip())
            note.append(f"{name}={text!r}: {error}")
            return row.default

    def flag(self, name: str, default: bool) -> bool:
        """A variable that is set but empty means off."""
        return (
            default if name not in self.env else self.env[name].strip().lower() not in FALSE_WORDS
        )

    @staticmethod
    def convert(text: str, default: Any, meta: Mapping[str, Any]) -> Any:
        """`text` as the type of `default`; ValueError says what was expected."""
        if isinstance(default, bool):
            return text.lower() not in FALSE_WORDS
        if isinstance(default, str):
            text = text.upper() if meta.get("upper") else text
            if "choices" in meta and text not in meta["choices"]:
                raise ValueError("expected " + " or ".join(meta["choices"]))
            return text
        kind, word = (int, "a whole number") if isinstance(default, int) else (float, "a number")
        try:
            number = kind(text)
        except ValueError:
            raise ValueError(f"expected {word}") from None
        low, high = meta.get("low", 0), meta.get("high", math.inf)
        if not low <= number <= high or number != number or number == math.inf:
            raise ValueError(f"expected {word} from {low} to {high}")
        return number

    def count(self, name: str, default: int) -> int:
        """A per-provider number: a bad one is a warning, not a refusal to start."""
        text = self.text(name)
        if text is None:
            return default
        if text.isascii() and text.isdigit() and len(text) < 16:
            return int(text)
        self.warnings.append(f"{name}={text!r}: expected a whole number; {default} is used")
        return default

    def document(self, path: Path) -> Json:
        """The JSON object in a file; missing = empty, unreadable = a warning."""
        try:
            data = json.loads(path.read_text(encoding="utf-8-sig"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self.warnings.append(f"{path.name} is ignored, it cannot be read: {error}")
            return {}
        if isinstance(data, dict):
            return data
        self.warnings.append(f"{path.name} is ignored, it does not hold a JSON object")
        return {}

    def check_overrides(self, overrides: Json) -> None:
        """Model rows of the override file, named in one problem when they cannot be used."""
        try:
            ModelFacts(overrides)
        except (ValueError, TypeError, AttributeError) as error:
            self.problems.append(f"MODELS_FILE: {error}")


def split_list(text: str | None) -> list[str]:
    """Items of a comma list, trimmed, blanks dropped."""
    return [item.strip() for item in (text or "").split(",") if item.strip()]


def read_key_scopes(auth: Json) -> dict[str, frozenset[str]]:
    """auth.json `proxy_keys`: key -> providers it may use (empty = all, {""} = none)."""
    rows = auth.get("proxy_keys")
    scopes = {}
    for key, row in rows.items() if isinstance(rows, dict) else ():
        if key.strip():
            scopes[key.strip()] = read_scope(
                row.get("allowed_providers") if isinstance(row, dict) else None
            )
    return scopes


def read_scope(allowed: object) -> frozenset[str]:
    """Provider names; what cannot be read lets nobody through instead of everybody."""
    if allowed is None or allowed == []:
        return frozenset()
    names = [n for n in allowed if isinstance(n, str)] if isinstance(allowed, list) else []
    return frozenset(p.name if (p := provider_named(n)) else n for n in names) or frozenset({""})


def read_services(reader: SettingsReader, auth: Json, port: int) -> tuple[Service, ...]:
    """Every provider that has what it needs: a key, or, where none is needed, being asked for."""
    stored = auth.get("providers")
    stored = stored if isinstance(stored, dict) else {}
    made = (read_service(reader, row, stored, port) for row in PROVIDERS)
    return tuple(service for service in made if service)


def read_service(reader: SettingsReader, row: Provider, stored: Json, port: int) -> Service | None:
    prefix = row.name.upper()
    pairs = read_keys(reader, row, stored)
    named = any(reader.env.get(f"{prefix}_{part}", "").strip() for part in ("BASE_URL", "MODEL"))
    if row.tier == "local" and not named:
        return None
    if row.keyless and named and not pairs:
        pairs = [("", "none needed")]
    if not pairs:
        return None
    url, own_url = read_base_url(reader, row, port)
    if not url:
        return None
    models = read_models(reader, row)
    tools = read_overrides(reader, prefix, models, "SUPPORTS_TOOLS")
    return Service(
        provider=row,
        url=url,
        keys=tuple(key for key, _ in pairs),
        key_sources=tuple(source for _, source in pairs),
        models=models,
        embed_model=reader.env.get(f"{prefix}_EMBED_MODEL", row.embed_model).strip(),
        skip_tokens_over=reader.count(f"{prefix}_SKIP_TOKENS_OVER", row.skip_tokens_over),
        max_output_tokens=reader.count(f"{prefix}_MAX_OUTPUT_TOKENS", row.max_output_tokens),
        tools=tools,
        reasoning=read_overrides(reader, prefix, models, "REASONING"),
        headers=read_headers(reader, row),
        resting=why_resting(row, own_url, models),
    )


def why_resting(row: Provider, own_url: bool, models: Sequence[str]) -> str:
    """A provider that is configured but never tried says why."""
    if row.dialect == "codex":
        return "the codex dialect is not built yet"
    if row.state == "retired" and not own_url:
        return f"retired on {row.state_date}: {row.note}"
    return "" if models else "no models are left"


def read_keys(reader: SettingsReader, row: Provider, stored: Json) -> list[tuple[str, str]]:
    """(key, where it was found): auth.json first, then X_API_KEY, X_API_KEYS, X_API_KEY_2 ..."""
    found: dict[str, str] = {}
    for name in (row.name, *row.aliases):
        keys = stored.get(name)
        for key in keys if isinstance(keys, list) else ():
            if isinstance(key, str) and key.strip():
                found.setdefault(key.strip(), "auth.json")
    for stem in row.key_env:
        for variable in (stem, stem + "S", *numbered(reader.env, stem)):
            for key in split_list(reader.env.get(variable)):
                found.setdefault(key, variable)
    for key in [k for k in found if not (k.isascii() and k.isprintable() and " " not in k)]:
        source = found.pop(key)
        reader.warnings.append(f"a {row.name} key from {source} is ignored: not printable ASCII")
    return list(found.items())


def numbered(env: Mapping[str, str], stem: str) -> Iterator[str]:
    """STEM_2, STEM_3, ... up to the first gap."""
    return itertools.takewhile(
        lambda name: env.get(name, "").strip(), (f"{stem}_{n}" for n in range(2, 1000))
    )


def read_base_url(reader: SettingsReader, row: Provider, port: int) -> tuple[str, bool]:
    """(URL, whether the user gave it). "" when it cannot be used, with a problem noted."""
    name = f"{row.name.upper()}_BASE_URL"
    text = reader.text(name)
    try:
        # OPENAI_BASE_URL is also the SDK's own variable: it may point at this very router.
        if text and row.name == "openai" and points_here(text, port):
            text = None
        url = normalise_base_url(text, row.known_path) if text else row.url
        for placeholder, variable in row.extra_env:
            if "{" + placeholder + "}" in url:
                url = url.replace("{" + placeholder + "}", fill(reader, variable))
    except ValueError as error:
        reader.problems.append(f"{name}: {error}" if text else f"{row.name}: {error}")
        return "", False
    return url, bool(text)


def points_here(url: str, port: int) -> bool:
    parts = urlsplit(url)
    return parts.hostname in LOOPBACK and parts.port == port


def fill(reader: SettingsReader, variable: str) -> str:
    """A part of a URL such as CLOUDFLARE_ACCOUNT_ID."""
    text = reader.text(variable)
    if not text or not re.fullmatch(r"[\w.-]+", text):
        raise ValueError(f"{variable} must be set, to letters, digits and dashes")
    return text


def read_models(reader: SettingsReader, row: Provider) -> tuple[str, ...]:
    prefix = row.name.upper()
    names = split_list(reader.env.get(f"{prefix}_MODEL")) or row.models
    excluded = {m.lower() for m in split_list(reader.env.get(f"{prefix}_EXCLUDE_MODELS"))}
    usable = []
    for name in dict.fromkeys(names):
        if not re.fullmatch(r"[\w.\-:/@+]+", name):
            reader.warnings.append(f"{prefix}_MODEL: {name!r} is not a model id and is ignored")
        elif name.lower() not in excluded:
            usable.append(name)
    return tuple(usable)


def read_overrides(
    reader: SettingsReader, prefix: str, models: Sequence[str], suffix: str
) -> Mapping[str, bool]:
    """<PROVIDER>_SUPPORTS_TOOLS and <PROVIDER>_<MODEL>_SUPPORTS_TOOLS, the latter winning."""
    names = {"": f"{prefix}_{suffix}"} | {m: f"{prefix}_{env_suffix(m)}_{suffix}" for m in models}
    return MappingProxyType(
        {model: reader.flag(name, True) for model, name in names.items() if name in reader.env}
    )


def env_suffix(model: str) -> str:
    """`gemini-2.5-pro` -> GEMINI_2_5_PRO."""
    return re.sub(r"[^A-Z0-9]+", "_", model.upper()).strip("_")


def read_headers(reader: SettingsReader, row: Provider) -> tuple[tuple[str, str], ...]:
    """The row's headers; OpenRouter's two may be set (OPENROUTER_SITE_URL, OPENROUTER_APP_NAME)."""
    own = {"HTTP-Referer": "OPENROUTER_SITE_URL", "X-Title": "OPENROUTER_APP_NAME"}
    return tuple(
        (name, (reader.text(own[name]) or value) if name in own else value)
        for name, value in row.headers
        if value or reader.text(own.get(name, ""))
    )


def write_private(path: Path, text: str) -> None:
    """Replace a file atomically, readable by its owner only (0600). OSError if that fails."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, stat.S_IRUSR | stat.S_IWUSR)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def with_proxy_key(config: Config) -> tuple[Config, str]:
    """The configuration with at least one caller key, and the key that was made ("" = none).

    A new key is written to the .env file; where that cannot be written it lives until the
    process ends, with a warning.
    """
    if config.proxy_keys or config.auth_mode == "open":
        return config, ""
    key = "sk-router-" + secrets.token_urlsafe(24)
    warnings = config.warnings
    try:
        config.home.mkdir(parents=True, exist_ok=True)
        old = config.env_file.read_text(encoding="utf-8") if config.env_file.exists() else ""
        kept = [
            x for x in old.splitlines() if (parse_dotenv_line(x) or ("",))[0] != "PROXY_API_KEYS"
        ]
        write_private(config.env_file, "\n".join([*kept, f"PROXY_API_KEYS={key}"]) + "\n")
    except (OSError, UnicodeDecodeError) as error:
        warnings = (
            *warnings,
            f"the new key could not be written to {config.env_file.name}: {error}",
        )
    return replace(config, proxy_keys=(key,), warnings=warnings), key


# =============================================================================
# 5. Tokens
# =============================================================================

# Bytes of JSON body per token of o200k_base: dense scripts and base64-like text, English prose with
# JSON around it, and long runs of common words. A request lies between the outer two.
BYTES_PER_TOKEN_MIN, BYTES_PER_TOKEN, BYTES_PER_TOKEN_MAX = 1.46, 4.0, 6.5

# What an image, audio clip or file costs, however long its base64 is: small, usual, large.
MEDIA_TOKENS = (85, 1_000, 1_600)

# Type of a content part -> member of its object that holds a URL or base64.
MEDIA_PARTS: Mapping[str, str] = {
    "image_url": "url",
    "video_url": "url",
    "input_audio": "data",
    "file": "file_data",
}

# Longer texts are counted by sample: 64 KB take about 4 ms, 1 MB would take 60.
MAX_COUNTED_CHARS = 65_536
SAMPLES = 4


@dataclass(frozen=True)
class TokenEstimate:
    """How many tokens a request has: certainly at least, probably, certainly at most."""

    low: int
    likely: int
    high: int

    def exceeds(self, limit: int) -> bool | None:
        """Is the request larger than `limit` tokens? None: too close to say, so count it."""
        if self.low > limit:
            return True
        return None if self.high > limit else False


def token_bounds(raw_len: int, chat: Mapping[str, Any]) -> TokenEstimate:
    """Estimate from the length of the body; images cost a flat sum instead of their length."""
    images = [len(source) for source in media_sources(chat)]
    text = max(raw_len - sum(images), 0)
    small, usual, large = (cost * len(images) for cost in MEDIA_TOKENS)
    return TokenEstimate(
        low=int(text / BYTES_PER_TOKEN_MAX) + small,
        likely=int(text / BYTES_PER_TOKEN) + usual,
        high=math.ceil(text / BYTES_PER_TOKEN_MIN) + large,
    )


def estimate_tokens(raw_len: int, chat: Mapping[str, Any]) -> int:
    """The likely number of input tokens of a request whose body has `raw_len` bytes."""
    return token_bounds(raw_len, chat).likely


def text_bytes(raw: bytes) -> int:
    r"""Length of a body in bytes, except that a \uXXXX escape counts as two of them, not six."""
    return len(raw) - 4 * raw.count(b"\\u")


def content_parts(chat: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every part of every message whose content is a list; what is malformed is passed over."""
    messages = chat.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            yield from (part for part in content if isinstance(part, dict))


def media_sources(chat: Mapping[str, Any]) -> Iterator[str]:
    """The URL or base64 of every image, clip and file in the messages; "" if it has none."""
    for part in content_parts(chat):
        kind = part.get("type")
        if isinstance(kind, str) and kind in MEDIA_PARTS:
            source = part.get(kind)
            if isinstance(source, dict):
                source = source.get(MEDIA_PARTS[kind])
            yield source if isinstance(source, str) else ""


def load_o200k() -> Callable[[str], int]:
    """A function that counts o200k_base tokens. Takes 0.3 s and 76 MB, or an endless download."""
    import tiktoken

    encode = tiktoken.get_encoding("o200k_base").encode
    # Without disallowed_special a text that merely mentions <|endoftext|> raises ValueError.
    return lambda text: len(encode(text, disallowed_special=()))


class Encoder:
    """Counts tokens exactly once its vocabulary has been loaded; never waits for that.

    `start` loads in a daemon thread. If that fails, or takes longer than `deadline_s` seconds, one
    warning is logged and `count` goes on answering None (until a late load succeeds after all).
    """

    def __init__(
        self, deadline_s: float = 20.0, load: Callable[[], Callable[[str], int]] = load_o200k
    ) -> None:
        self._deadline_s, self._load = deadline_s, load
        self._lock = threading.Lock()
        self._started = self._warned = False
        self._count: Callable[[str], int] | None = None

    @property
    def ready(self) -> bool:
        return self._count is not None

    def start(self) -> None:
        """Begin loading in the background; later calls do nothing."""
        with self._lock:
            if self._started:
                return
            self._started = True
        threading.Thread(target=self._watch, name="encoder-watch", daemon=True).start()

    def count(self, text: str) -> int | None:
        """Tokens in `text`, by sample above MAX_COUNTED_CHARS; None while nothing is loaded."""
        count = self._count
        if count is None:
            return None
        if len(text) <= MAX_COUNTED_CHARS:
            return count(text)
        step, size = len(text) // SAMPLES, MAX_COUNTED_CHARS // SAMPLES
        sampled = sum(count(text[at * step : at * step + size]) for at in range(SAMPLES))
        return round(sampled * len(text) / (SAMPLES * size))

    def _watch(self) -> None:
        # The load itself cannot be interrupted, so a second thread keeps the time.
        loader = threading.Thread(target=self._load_once, name="encoder-load", daemon=True)
        loader.start()
        loader.join(self._deadline_s)
        if loader.is_alive():
            self._warn(f"it did not load within {self._deadline_s:g} s")

    def _load_once(self) -> None:
        try:
            self._count = self._load()
        except Exception as error:
            log.debug("tiktoken could not be loaded", exc_info=True)
            self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, reason: str) -> None:
        with self._lock:
            first, self._warned = not self._warned, True
        if first:
            log.warning("tiktoken: %s; token counts are estimated from bytes", reason)


# =============================================================================
# 6. Events
# =============================================================================

# WHATWG server-sent events: lines end in LF, CRLF or CR; a blank line ends an event; the
# space after the colon is optional. Bytes are cut only where an event ends, so what is
# passed on is byte for byte what the provider sent.
EVENT_END: Final = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n")
LINE_END: Final = re.compile(rb"\r\n|\n|\r")
DONE: Final = b"data: [DONE]\n\n"
MAX_EVENT_BYTES: Final = 16 << 20


def last_event_end(data: bytes) -> int:
    """Position after the last complete event in `data`, 0 when there is none."""
    at = max(data.rfind(b"\n\n") + 2, data.rfind(b"\n\r\n") + 3, data.rfind(b"\r\r") + 2)
    return at if at > 2 else 0  # 2 = nothing found (or one blank line, which can wait)


def split_events(data: bytes) -> list[bytes]:
    """Complete events with their blank lines; a rest without one comes last."""
    events, start = [], 0
    for match in EVENT_END.finditer(data):
        events.append(data[start : match.end()])
        start = match.end()
    return [*events, data[start:]] if start < len(data) else events


class EventCutter:
    """Cuts a stream after its last whole event, however it arrives; each byte is looked at once."""

    __slots__ = ("_pieces", "_size", "_tail")

    def __init__(self) -> None:
        self._pieces: list[bytes] = []  # what came after the last whole event
        self._size = 0
        self._tail = b""  # its last bytes: the end of an event may arrive in pieces

    def feed(self, data: bytes) -> bytes:
        """Every event that is complete now, b"" when none is; ValueError for an endless one."""
        tail = self._tail
        cut = last_event_end(tail + data if tail else data) - len(tail)
        if cut <= 0:
            self._pieces.append(data)
            self._size += len(data)
            self._tail = (tail + data)[-3:]
            if self._size > MAX_EVENT_BYTES:
                raise ValueError("an event without an end")
            return b""
        block, rest = data[:cut], data[cut:]
        if self._pieces:
            block = b"".join([*self._pieces, block])
        self._pieces, self._size, self._tail = [rest] if rest else [], len(rest), rest[-3:]
        return block

    @property
    def rest(self) -> bytes:
        """What has come of an event that is not complete."""
        return b"".join(self._pieces)


def event_data(event: bytes) -> bytes:
    """The joined `data:` lines of one event; b"" for comments and other fields."""
    if event.startswith(b"data: ") and event.find(b"\n") >= len(event) - 2:
        return event[6:].rstrip(b"\r\n")
    event = event.removeprefix(b"\xef\xbb\xbf")  # a byte order mark may lead the stream
    lines = (line for line in LINE_END.split(event) if line.startswith(b"data:"))
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines)


def encode_event(payload: object) -> bytes:
    return b"data: " + dump_json(payload) + b"\n\n"


def dump_json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


# =============================================================================
# 7. Chat
# =============================================================================

MAX_NESTING = 100  # lists and objects inside one another; real requests stay below 20
CONTAINERS = frozenset((dict, list))
NOT_AN_OBJECT = "request body must be a JSON object"
NO_INPUT = "request body must be a JSON object with an 'input' field"

# In JSON text: an escaped half of a surrogate pair, and one that has no partner beside it.
HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
LONE_HALF = re.compile(
    rb"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|[c-fC-F](?<!\\u[dD][89abAB]..\\u[dD].))"
)


def refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value")


def finite_float(digits: str) -> float:
    """float(), but a number too large for one is refused: it would be sent on as Infinity."""
    value = float(digits)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return value


DECODER = json.JSONDecoder(parse_constant=refuse_constant, parse_float=finite_float)


def parse_body(raw: bytes) -> dict[str, Any]:
    """The JSON object in a request body; BadRequest for what could not be sent on as UTF-8 JSON."""
    if not raw or raw.isspace():
        raise BadRequest(f"{NOT_AN_OBJECT} (it is empty)")
    try:
        body = DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRequest(f"{NOT_AN_OBJECT} in UTF-8 (byte {error.start} is not)") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise BadRequest(f"{NOT_AN_OBJECT} ({error.msg}: {where})") from None
    except RecursionError:
        raise BadRequest(f"{NOT_AN_OBJECT} (nested deeper than {MAX_NESTING} levels)") from None
    except ValueError:
        raise bad_number(raw) from None
    if not isinstance(body, dict):
        raise BadRequest(f"{NOT_AN_OBJECT}, not {kind_of(body)}")
    if nests_too_deep(body):
        field = next(name for name, value in body.items() if nests_too_deep([value]))
        raise BadRequest(f"{field} is nested deeper than {MAX_NESTING} levels", param=field)
    if (
        (b"\\ud" in raw or b"\\uD" in raw)
        and HALF_PAIR.search(raw)
        and LONE_HALF.search(raw.replace(b"\\\\", b"__"))
    ):
        path = find_value(body, is_broken_text)
        message = f"{path or 'request body'} holds half of a surrogate pair, which is not text"
        raise BadRequest(message, param=path)
    return body


def bad_number(raw: bytes) -> BadRequest:
    """The error for NaN, Infinity and endless numbers, naming the field where that can be told."""
    try:
        path = find_value(json.loads(raw, parse_int=float), is_not_finite)
    except (ValueError, RecursionError):  # it is no JSON further on
        path = None
    return BadRequest(f"{path or 'request body'} holds a number that is not finite", param=path)


def nests_too_deep(value: list[Any] | dict[str, Any]) -> bool:
    """Are there more than MAX_NESTING lists and objects inside one another?"""
    level: list[Any] = [value]
    for _ in range(MAX_NESTING):
        levels = (v.values() if type(v) is dict else v for v in level)
        level = [v for values in levels for v in values if type(v) in CONTAINERS]
        if not level:
            return False
    return True


def find_value(body: object, is_wanted: Callable[[object], bool]) -> str | None:
    """Path (`messages[0].content`) of the first value or key that `is_wanted`, or None."""
    todo: list[tuple[str, object]] = [("", body)]
    while todo:
        path, value = todo.pop()
        if is_wanted(value):
            return path.encode("utf-8", "backslashreplace").decode() or None
        if isinstance(value, dict):
            todo += [(f"{path}.{k}".lstrip("."), k) for k in value if is_wanted(k)]
            todo += [(f"{path}.{k}".lstrip("."), v) for k, v in reversed(value.items())]
        elif isinstance(value, list):
            todo += [(f"{path}[{at}]", v) for at, v in reversed(list(enumerate(value)))]
    return None


def is_broken_text(value: object) -> bool:
    return isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value)


def is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def is_string(value: object) -> bool:
    return isinstance(value, str)


def is_boolean(value: object) -> bool:
    return isinstance(value, bool)


def is_number(value: object) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def is_integer(value: object) -> bool:
    return type(value) is int  # True and False are integers to isinstance


def is_natural(value: object) -> bool:
    return type(value) is int and value >= 1


def is_object(value: object) -> bool:
    return isinstance(value, dict)


def is_list(value: object) -> bool:
    return isinstance(value, list)


def is_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def is_string_or_strings(value: object) -> bool:
    return isinstance(value, str) or is_strings(value)


def is_string_or_object(value: object) -> bool:
    return isinstance(value, (str, dict))


def is_typed_object(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("type"), str)


def is_encoding_format(value: object) -> bool:
    return value in ("float", "base64")


@dataclass(frozen=True)
class FieldRule:
    """What a request field must be if it is there and not null; ranges are left to the provider."""

    wants: str
    holds: Callable[[object], bool]


CHAT_FIELDS: Mapping[str, FieldRule] = {
    "model": FieldRule("a string", is_string),
    "stream": FieldRule("true or false", is_boolean),
    "stream_options": FieldRule("an object", is_object),
    "temperature": FieldRule("a number", is_number),
    "top_p": FieldRule("a number", is_number),
    "presence_penalty": FieldRule("a number", is_number),
    "frequency_penalty": FieldRule("a number", is_number),
    "max_tokens": FieldRule("an integer of at least 1", is_natural),
    "max_completion_tokens": FieldRule("an integer of at least 1", is_natural),
    "n": FieldRule("an integer of at least 1", is_natural),
    "seed": FieldRule("an integer", is_integer),
    "top_logprobs": FieldRule("an integer", is_integer),
    "logprobs": FieldRule("true or false", is_boolean),
    "stop": FieldRule("a string or a list of strings", is_string_or_strings),
    "tools": FieldRule("a list of tools", is_list),
    "tool_choice": FieldRule("a string or an object", is_string_or_object),
    "parallel_tool_calls": FieldRule("true or false", is_boolean),
    "functions": FieldRule("a list of functions", is_list),
    "function_call": FieldRule("a string or an object", is_string_or_object),
    "response_format": FieldRule("an object with a type", is_typed_object),
    "logit_bias": FieldRule("an object", is_object),
    "metadata": FieldRule("an object", is_object),
    "modalities": FieldRule("a list of strings", is_strings),
    "reasoning_effort": FieldRule("a string", is_string),
    "service_tier": FieldRule("a string", is_string),
    "store": FieldRule("true or false", is_boolean),
    "user": FieldRule("a string", is_string),
}

EMBEDDING_FIELDS: Mapping[str, FieldRule] = {
    "model": FieldRule("a string", is_string),
    "encoding_format": FieldRule('"float" or "base64"', is_encoding_format),
    "dimensions": FieldRule("an integer of at least 1", is_natural),
    "user": FieldRule("a string", is_string),
}

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

# An assistant message that has one of these may do without content.
INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "refusal", "audio", "reasoning_content")

# Content parts that are checked, and the string each must have; other types are passed on.
PART_MEMBERS: Mapping[str, str] = {"text": "text", "refusal": "refusal", "image_url": "url"}


def validate_chat(chat: Mapping[str, Any]) -> None:
    """Raise BadRequest, naming the field, unless all that any provider relies on is sound.

    Unknown fields pass, and null counts as absent wherever a field is optional.
    """
    check_fields(chat, CHAT_FIELDS)
    messages = chat.get("messages")
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "a list of at least one message", messages)
    for at, message in enumerate(messages):
        check_message(message, f"messages[{at}]")
    for at, tool in enumerate(chat.get("tools") or ()):
        check_tool(tool, f"tools[{at}]")
    for at, function in enumerate(chat.get("functions") or ()):
        check_named(function, f"functions[{at}]")


def validate_embeddings(body: Mapping[str, Any]) -> None:
    """The same for an embeddings request: `input` is text, texts, tokens or lists of tokens."""
    given = body.get("input")
    if given is None:
        raise BadRequest(NO_INPUT, param="input")
    check_fields(body, EMBEDDING_FIELDS)
    if not isinstance(given, (str, list)) or not given:
        raise invalid("input", "a string or a list of strings or tokens, and not empty", given)
    if isinstance(given, list):
        check_inputs(given)


def check_inputs(items: list[Any]) -> None:
    """All strings, all integers or all lists of integers. Sets of types, as that is fast."""
    kinds = set(map(type, items))
    if kinds == {str} or kinds == {int}:
        return
    first = type(items[0])
    if first not in (str, int, list):
        raise invalid("input[0]", "a string, an integer or a list of integers", items[0])
    for at, item in enumerate(items):
        if type(item) is not first:
            raise invalid(f"input[{at}]", "of the same type as input[0]", item)
        if first is list and set(map(type, item)) != {int}:
            raise invalid(f"input[{at}]", "a list of integers, and not empty", item)


def check_fields(body: Mapping[str, Any], rules: Mapping[str, FieldRule]) -> None:
    for name, value in body.items():
        if value is not None and (rule := rules.get(name)) and not rule.holds(value):
            raise invalid(name, rule.wants, value)


def check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise invalid(where, "an object with a role and content", message)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise invalid(f"{where}.role", f"one of {', '.join(ROLES)}", role)
    if not isinstance(content, str) and not is_silent(message, role, content):
        check_content(content, f"{where}.content")
    name = message.get("name")
    if name is not None and not isinstance(name, str):
        raise invalid(f"{where}.name", "a string", name)
    if role == "assistant":
        check_calls(message, where)
    elif role == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise invalid(f"{where}.tool_call_id", "a string", message.get("tool_call_id"))


def is_silent(message: Mapping[str, Any], role: str, content: object) -> bool:
    """May this message do without content, and does it?"""
    if content is not None and content != []:
        return False
    if role == "function":
        return content is None
    return role == "assistant" and any(message.get(name) for name in INSTEAD_OF_CONTENT)


def check_content(content: Any, where: str) -> None:
    if not isinstance(content, list) or not content:
        raise invalid(where, "a string or a list of at least one part", content)
    for at, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise invalid(f"{where}[{at}]", "an object with a type", part)
        if kind in PART_MEMBERS:
            check_part(part, kind, f"{where}[{at}].{kind}")


def check_part(part: Mapping[str, Any], kind: str, where: str) -> None:
    value, member = part.get(kind), PART_MEMBERS[kind]
    if isinstance(value, str):  # an image_url as plain string is what several clients send
        return
    if member == kind:
        raise invalid(where, "a string", value)
    if not isinstance(value, dict):
        raise invalid(where, f"an object with a {member}", value)
    if not isinstance(value.get(member), str):
        raise invalid(f"{where}.{member}", "a string", value.get(member))


def check_calls(message: Mapping[str, Any], where: str) -> None:
    """The calls an assistant message made: tool_calls, or the older function_call."""
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise invalid(f"{where}.tool_calls", "a list of tool calls", calls)
    for at, call in enumerate(calls or ()):
        check_tool_call(call, f"{where}.tool_calls[{at}]")
    if (call := message.get("function_call")) is not None:
        check_named(call, f"{where}.function_call", text="arguments")


def check_tool_call(call: Any, where: str) -> None:
    if not isinstance(call, dict):
        raise invalid(where, "an object with a function", call)
    if call.get("id") is not None and not isinstance(call["id"], str):
        raise invalid(f"{where}.id", "a string", call["id"])
    if call.get("type") == "custom":
        check_named(call.get("custom"), f"{where}.custom", text="input")
    else:
        check_named(call.get("function"), f"{where}.function", text="arguments")


def check_tool(tool: Any, where: str) -> None:
    """A function or custom tool has a name; a provider's own tools only need another type."""
    if not isinstance(tool, dict):
        raise invalid(where, "an object with a function", tool)
    kind = "function" if tool.get("type") is None else tool["type"]
    if not isinstance(kind, str):
        raise invalid(f"{where}.type", "a string", kind)
    if kind in ("function", "custom"):
        check_named(tool.get(kind), f"{where}.{kind}")


def check_named(value: Any, where: str, text: str | None = None) -> None:
    """An object with a name, and with a string called `text` if that is asked for."""
    if not isinstance(value, dict):
        raise invalid(where, "an object with a name", value)
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise invalid(f"{where}.name", "a string, and not empty", name)
    if text is not None and not isinstance(value.get(text), str):
        raise invalid(f"{where}.{text}", "a string", value.get(text))


def invalid(path: str, wants: str, value: object) -> BadRequest:
    """The error for a field that is not what it must be."""
    found = "but it is missing or null" if value is None else f"not {kind_of(value)}"
    return BadRequest(f"{path} must be {wants}, {found}", param=path)


def kind_of(value: object) -> str:
    """What a JSON value is, in words, with short values as they are."""
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "an object" if value else "an empty object"
    if isinstance(value, str):
        return f"the string {json.dumps(value)}" if len(value) <= 40 else "a string"
    if type(value) is int and abs(value) >= 10**15:
        return "so large a number"
    return json.dumps(value)


def message_text(message: Mapping[str, Any]) -> str:
    """The text of one message, its text parts joined by line breaks; "" if there is none."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = (part.get("text") if isinstance(part, dict) else part for part in content)
    return "\n".join(text for text in texts if isinstance(text, str))


def chat_messages(chat: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages that are objects, for code that must not trip over a chat nobody validated."""
    messages = chat.get("messages")
    return [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []


def last_user_text(chat: Mapping[str, Any]) -> str:
    """Text of the latest user message, or "" if the user said nothing."""
    for message in reversed(chat_messages(chat)):
        if message.get("role") == "user":
            return message_text(message)
    return ""


def chat_text(chat: Mapping[str, Any]) -> str:
    """Everything in a chat that costs text tokens: messages, calls made, and the tools on offer."""
    texts = []
    for message in chat_messages(chat):
        texts.append(message_text(message))
        if calls := message.get("tool_calls"):
            texts.append(json.dumps(calls, ensure_ascii=False))
    if tools := chat.get("tools"):
        texts.append(json.dumps(tools, ensure_ascii=False))
    return "\n".join(texts)


def count_tokens(chat: Mapping[str, Any], encoder: Encoder) -> int | None:
    """Input tokens by the encoder: 3, 4 a message, the text, the images; None if not loaded."""
    text_tokens = encoder.count(chat_text(chat))
    if text_tokens is None:
        return None
    media = MEDIA_TOKENS[1] * sum(1 for _ in media_sources(chat))
    return 3 + 4 * len(chat_messages(chat)) + text_tokens + media


def wants_tools(chat: Mapping[str, Any]) -> bool:
    """Does the request offer tools? The history may hold tool calls without that."""
    return bool(chat.get("tools") or chat.get("functions"))


def wants_vision(chat: Mapping[str, Any]) -> bool:
    """Is there an image anywhere in the messages?"""
    return any(part.get("type") == "image_url" for part in content_parts(chat))


def wants_json(chat: Mapping[str, Any]) -> bool:
    """Must the answer be JSON, with or without a schema?"""
    wanted = chat.get("response_format")
    return isinstance(wanted, dict) and wanted.get("type") in ("json_object", "json_schema")


# =============================================================================
# 8. Replies
# =============================================================================

# Where a chat message or a delta may carry something worth having (docs/architecture.md:
# a useful event). Reasoning has three spellings: groq, deepseek, openrouter (seen 2026-10).
CONTENT_KEYS: Final = (
    "content",
    "tool_calls",
    "function_call",
    "refusal",
    "audio",
    "reasoning_content",
    "reasoning",
    "reasoning_details",
)
# A finish that explains why nothing came: no failure of the provider.
TELLING_FINISHES: Final = frozenset({"length", "content_filter", "max_tokens"})
SECRET: Final = re.compile(
    r"(?i)\b(?:sk|gsk|csk|xai|nvapi|hf|ghp|github_pat|key|pk|rk|r8|AIza)[-_]?[A-Za-z0-9_\-]{12,}"
    r"|(?<=bearer )\S+|(?<=key=)[^&\s\"']+"
)


class Tokens(NamedTuple):
    """Token counts of one answer as the provider states them."""

    prompt: int = 0
    completion: int = 0


class Outcome(NamedTuple):
    """What came of one attempt, before it is judged.

    `status` is the HTTP status, or that which an error inside a 200 stands for, or 0 when no
    usable answer came; `text` is the provider's own words (or ours), scrubbed of secrets.
    """

    status: int
    text: str
    sort: str = ""  # "", "network", "timeout", "empty", "garbled": set when status is 0
    retry_after: float | None = None
    code: str = ""  # the provider's machine-readable word for it


def read_json(body: bytes) -> Any:
    """The JSON value in `body`, or None. A gateway's padding in front is tolerated."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def scrub(text: str, limit: int = 600) -> str:
    """One line of at most `limit` characters without anything that looks like a key."""
    return SECRET.sub("[redacted]", " ".join(text[: 4 * limit].split()))[:limit]


def error_text(body: bytes) -> str:
    """The reason inside an error body of any known shape.

    Shapes (seen in recorded traffic): {error: {message}}, [{error: ...}], {error: "text"},
    {message}, {detail: "text" or list}, {errors: [{message}]}, {title, status}, JSON inside
    error.metadata.raw, HTML, plain text.
    """
    value = read_json(body)
    if value is not None:
        return scrub(dig_message(value) or body.decode("utf-8", "replace"))
    text = body[:4000].decode("utf-8", "replace").strip()
    if text[:1] == "<":
        title = re.search(r"(?is)<title>(.*?)</title>", text)
        return scrub("an HTML page" + (f": {title[1]}" if title else ""))
    return scrub(text)


def error_code(body: bytes) -> str:
    """`code`, `type` and `status` words of an error body, for the rules only."""
    value = read_json(body)
    value = value[0] if isinstance(value, list) and value else value
    error = value.get("error") if isinstance(value, dict) else None
    places = [place for place in (error, value) if isinstance(place, dict)]
    found = (place.get(name) for place in places for name in ("code", "type", "status"))
    return " ".join(word for word in found if isinstance(word, str))[:300]


def dig_message(value: Any, depth: int = 6) -> str:
    """The most specific message text inside an error value."""
    if isinstance(value, str):
        return value
    if not depth:
        return ""
    if isinstance(value, list):
        return next((text for item in value[:5] if (text := dig_message(item, depth - 1))), "")
    if not isinstance(value, dict):
        return ""
    raw = (value.get("metadata") or {}).get("raw") if isinstance(value.get("metadata"), dict) else 0
    if isinstance(raw, str) and raw.strip():
        inner = read_json(raw.encode())
        return f"{value.get('message', '')}: {dig_message(inner, depth - 1) or raw}"
    names = ("error", "message", "detail", "errors", "msg", "error_description", "title")
    return next((text for n in names if (text := dig_message(value.get(n), depth - 1))), "")


def embedded_error(value: Any) -> Outcome | None:
    """The error that a 200 body or a stream event holds, if it holds one."""
    value = value[0] if isinstance(value, list) and value else value
    if not isinstance(value, dict):
        return None
    error = value.get("error")
    if not error and value.get("type") != "error" and value.get("object") != "error":
        return (
            None if value.get("success", True) or value.get("choices") else Outcome(502, "failed")
        )
    return Outcome(embedded_status(value), scrub(dig_message(value) or json.dumps(error)[:600]))


def embedded_status(value: Json) -> int:
    """The HTTP status an error object stands for; 502 when it does not say."""
    error = value.get("error")
    places = [error, value] if isinstance(error, dict) else [value]
    for place in places:
        for name in ("code", "status_code", "status", "http_status"):
            number = str(place.get(name, ""))
            if number.isascii() and number.isdigit() and 400 <= int(number) <= 599:
                return int(number)
    return 502


def has_content(message: Any) -> bool:
    """Whether a message or delta carries text, a call, reasoning, audio or a refusal."""
    if not isinstance(message, dict):
        return False
    content = message.get("content")
    if isinstance(content, str) and content:
        return True
    return any(message.get(key) for key in CONTENT_KEYS)


def judge_reply(body: bytes) -> tuple[Outcome | None, Json]:
    """(what is wrong with a 200 chat body or None, the parsed reply)."""
    reply = read_json(body)
    if not body.strip():
        return Outcome(0, "an empty body", "empty"), {}
    error = embedded_error(reply)
    if error:
        return error, {}
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices:
        return Outcome(0, f"no choices in the answer: {error_text(body)[:200]}", "garbled"), {}
    if any(answers(choice) for choice in choices):
        return None, reply
    return Outcome(0, "an answer without content", "empty"), {}


def answers(choice: Any) -> bool:
    """Whether one choice of a whole reply is an answer, if only a telling finish."""
    if not isinstance(choice, dict):
        return False
    return (
        has_content(choice.get("message"))
        or bool(choice.get("text"))
        or str(choice.get("finish_reason")) in TELLING_FINISHES
    )


Sign = Literal["", "useful", "finish", "empty finish"]


def chunk_sign(chunk: Any) -> Sign:
    """What one stream chunk means for the decision to commit."""
    choices = chunk.get("choices") if isinstance(chunk, dict) else None
    finish = ""
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, dict):
            continue
        delta = choice.get("delta") or choice.get("message")
        if has_content(delta) or choice.get("text"):
            return "useful"
        finish = str(choice.get("finish_reason") or "") or finish
    if not finish:
        return ""
    return "finish" if finish in TELLING_FINISHES else "empty finish"


def tokens_of(value: Any) -> Tokens | None:
    """Token counts in a reply, a chunk or an embeddings answer (groq's live in x_groq too)."""
    if not isinstance(value, dict):
        return None
    usage = value.get("usage")
    if not usage and isinstance(value.get("x_groq"), dict):
        usage = value["x_groq"].get("usage")
    if not isinstance(usage, dict):
        return None
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return Tokens(*(n if isinstance(n, int) and n > 0 else 0 for n in counts))


def chunks_from_reply(reply: Json) -> list[Json]:
    """A whole reply as the chunks of a stream, for a provider that does not stream when asked."""
    head = {k: v for k, v in reply.items() if k not in ("choices", "usage", "object")}
    choices = []
    for n, choice in enumerate(c for c in reply["choices"] if isinstance(c, dict)):
        message = choice.get("message")
        delta: Json = {"role": "assistant", **(message if isinstance(message, dict) else {})}
        if isinstance(calls := delta.get("tool_calls"), list):
            made = (call for call in calls if isinstance(call, dict))
            delta["tool_calls"] = [{"index": at, **call} for at, call in enumerate(made)]
        finish = choice.get("finish_reason") or "stop"
        choices.append({"index": n, "delta": delta, "finish_reason": finish})
    chunks = [{**head, "object": "chat.completion.chunk", "choices": choices}]
    if reply.get("usage"):
        chunks.append({**chunks[0], "choices": [], "usage": reply["usage"]})
    return chunks


# =============================================================================
# 9. Outgoing
# =============================================================================

DROP: Final = object()  # an edit that removes a member
# Reasoning of earlier turns that most providers answer 400 to when it comes back
# (groq "property 'reasoning_content' is unsupported", cerebras, mistral; seen 2026-09).
REASONING_KEYS: Final = ("reasoning", "reasoning_content", "reasoning_details", "think", "thinking")
ASCII_ESCAPE: Final = re.compile(rb"\\u00[2-7]")
SCALAR: Final = rb'\s*:\s*(?:"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null)'


def edit_body(raw: bytes, chat: Json, edits: Mapping[str, object]) -> bytes:
    """`raw` with top-level members set, or removed where the edit is DROP.

    The client's bytes are kept when each edit is a new member or a scalar that stands
    exactly once in them; otherwise the parsed `chat` is written anew.
    """
    body: bytes | None = raw
    for name, value in edits.items():
        body = splice(body, name, value, name in chat) if body else None
    if body:
        return body
    whole = {**chat, **edits}
    return dump_json({name: value for name, value in whole.items() if value is not DROP})


def splice(body: bytes, name: str, value: object, present: bool) -> bytes | None:
    """One edit made in the bytes; None when that is not safe."""
    if value is DROP:
        return None if present else body
    if b"\\u00" in body and ASCII_ESCAPE.search(body):
        return None  # a name may be spelled "mod\u0065l"
    member = b'"%b"' % name.encode()
    written = dump_json(value)
    if not present:
        start = body.index(b"{") + 1
        if body[start:].lstrip().startswith(b"}"):
            return None
        return b"%b%b:%b,%b" % (body[:start], member, written, body[start:])
    if body.count(member) != 1:
        return None
    match = member_pattern(name).search(body)
    return match and b"%b%b:%b%b" % (body[: match.start()], member, written, body[match.end() :])


@functools.lru_cache(maxsize=64)
def member_pattern(name: str) -> re.Pattern[bytes]:
    return re.compile(b'"%b"' % re.escape(name.encode()) + SCALAR)


def without_reasoning(messages: Sequence[Json]) -> list[Json] | None:
    """History without reasoning of earlier turns; None when there is none to remove."""
    if not any(key in message for message in messages for key in REASONING_KEYS):
        return None
    return [{k: v for k, v in m.items() if k not in REASONING_KEYS} for m in messages]


def output_edits(chat: Json, reserve: int, ceiling: int) -> dict[str, object]:
    """max_tokens raised by the reasoning reserve, then held under the provider's ceiling."""
    edits: dict[str, object] = {}
    for name in ("max_tokens", "max_completion_tokens"):
        asked = chat.get(name)
        if isinstance(asked, int) and not isinstance(asked, bool):
            wanted = min(asked + reserve, ceiling) if ceiling else asked + reserve
            if wanted != asked:
                edits[name] = wanted
    return edits


# =============================================================================
# 10. Hub
# =============================================================================

SEAL: Final = "hr1."


@dataclass(frozen=True)
class Opening:
    """What an answer in a client's own dialect begins with.

    `created` is in unix seconds, `input_tokens` an estimate, `request` the client's parsed body.
    """

    id: str  # 24 random characters; each dialect puts its prefix in front
    model: str  # as the client asked for it
    created: int = 0
    input_tokens: int = 0
    request: Json = field(default_factory=dict)


def seal(origin: str, value: str) -> str:
    """An opaque value with the name of the provider it must go back to."""
    return f"{SEAL}{origin}.{value}"


def unseal(text: str) -> tuple[str, str]:
    """(origin, value) of a sealed text; what was never sealed has the origin ""."""
    if not text.startswith(SEAL):
        return "", text
    origin, _, value = text[len(SEAL) :].partition(".")
    return origin, value


# =============================================================================
# 11. Dialects
# =============================================================================


def only_content(block: bytes) -> bool:
    """Whether a block of chat events surely holds no error, finish, usage or end.

    A few fast searches for a whole block: a pattern that stops at every quote costs ten times
    as much, parsing fifty times.
    """
    count = block.count
    return (
        count(b'"finish_reason"')
        == count(b'"finish_reason":null') + count(b'"finish_reason": null')
        and b'"error"' not in block
        and count(b'"usage"') == count(b'"usage":null') + count(b'"usage": null')
        and b"[DONE]" not in block
        and b"event:" not in block
        and b'"x_groq"' not in block
    )


class Sight(NamedTuple):
    """What one event of a provider's stream tells."""

    sign: Sign = ""
    error: Outcome | None = None
    tokens: Tokens | None = None
    finished: bool = False  # how the answer ended is stated
    done: bool = False  # nothing comes after it
    only_usage: bool = False


def see_chat(data: bytes) -> Sight:
    if data == b"[DONE]":
        return Sight("empty finish", finished=True, done=True)
    chunk = read_json(data)
    if error := embedded_error(chunk):
        return Sight(error=error)
    choices = chunk.get("choices") if isinstance(chunk, dict) else None
    listed = choices if isinstance(choices, list) else ()
    finished = any(isinstance(c, dict) and c.get("finish_reason") for c in listed)
    only_usage = choices == [] and bool(chunk.get("usage"))
    return Sight(chunk_sign(chunk), None, tokens_of(chunk), finished, only_usage=only_usage)


def judge_embeddings(body: bytes) -> tuple[Outcome | None, Json]:
    reply = read_json(body)
    error = embedded_error(reply)
    if error:
        return error, {}
    if isinstance(reply, dict) and isinstance(reply.get("data"), list) and reply["data"]:
        return None, reply
    return Outcome(0, f"no embeddings in the answer: {error_text(body)[:200]}", "garbled"), {}


@dataclass(frozen=True)
class Dialect:
    """A language that providers speak."""

    name: str
    path: str  # below a provider's base URL
    judge: Callable[[bytes], tuple[Outcome | None, Json]]  # a whole answer: (problem, reply)
    only_content: Callable[[bytes], bool] = only_content
    see: Callable[[bytes], Sight] = see_chat
    closing: bytes = DONE  # what a stream ends with


DIALECTS: Final = {
    row.name: row
    for row in (
        Dialect("chat", "/chat/completions", judge_reply),
        Dialect("embeddings", "/embeddings", judge_embeddings),
    )
}


class Flow:
    """The events of one answer on their way to the client.

    Fed with blocks of whole events. Before `useful` is set nothing may reach the client;
    once `failure` is set nothing more does but what `fail` gives.
    """

    def __init__(self, dialect: Dialect, wants_usage: bool, secret: bytes = b"") -> None:
        self._dialect, self._wants_usage, self._secret = dialect, wants_usage, secret
        self.useful = False
        self.finished = False  # how the answer ended was stated
        self.done = False  # nothing comes any more
        self.tokens: Tokens | None = None
        self.failure: Outcome | None = None

    def take(self, block: bytes) -> bytes:
        """What the client gets for a block of whole events."""
        if self.useful and self._dialect.only_content(block):
            return block
        middle = len(block) // 2
        cut = last_event_end(block[:middle]) if self.useful else 0
        if not cut:
            return b"".join(map(self._look, split_events(block)))
        # Halving finds the few events that need a look without parsing all the others.
        return self.take(block[:cut]) + self.take(block[cut:])

    def _look(self, event: bytes) -> bytes:
        """One event that may be more than content; what the client gets of it."""
        data = event_data(event)
        if self.failure or not data:
            return b"" if self.failure else event
        sight = self._dialect.see(data)
        if sight.error:
            self.failure = self._dialect.see(masked(data, self._secret)).error or BROKEN
            return b""
        self._note(sight)
        return b"" if self.failure or (sight.only_usage and not self._wants_usage) else event

    def _note(self, sight: Sight) -> None:
        self.tokens = sight.tokens or self.tokens
        self.finished = self.finished or sight.finished
        self.done = self.done or sight.done
        if sight.sign == "empty finish" and not self.useful:
            self.failure = Outcome(0, "a stream without content", "empty")
        elif sight.sign:
            self.useful = True

    def end(self, rest: bytes) -> bytes:
        """The body ended with `rest`: the event without a blank line, if any, and a proper end."""
        rest = rest.strip(b"\r\n")
        data = event_data(rest)
        block = b""
        if data == b"[DONE]" or read_json(data) is not None:
            block = self._look(rest + b"\n\n")
        if self.failure or self.finished:
            return block if self.failure or self.done else block + self._dialect.closing
        self.failure = Outcome(0, "the stream ended without a finish", "reset")
        return block

    def adopt(self, body: bytes) -> bytes:
        """A whole answer where a stream was asked for, as a stream."""
        self.failure, reply = self._dialect.judge(masked(body, self._secret))
        if self.failure:
            return b""
        self.tokens = tokens_of(reply)
        return self.take(b"".join(map(encode_event, chunks_from_reply(reply))) + DONE)

    def fail(self, error: RouterError) -> bytes:
        """The event that ends a committed stream; no [DONE], no finish: nothing is faked."""
        return encode_event(error_body(error))


BROKEN: Final = Outcome(0, "an answer that cannot be used", "garbled")


def masked(data: bytes, secret: bytes) -> bytes:
    """`data` without the provider's key: some repeat it in their errors."""
    return data.replace(secret, b"[redacted]") if secret and secret in data else data


# =============================================================================
# 12. Keys
# =============================================================================

# Rests that a last round may overlook when nothing else is left: guesses about health,
# not limits that the provider stated.
GUESSES: Final = frozenset(
    {
        "provider_error",
        "unreachable",
        "timeout",
        "reset",
        "empty_answer",
        "bad_answer",
        "unexpected_status",
    }
)
ANY: Final = "*"  # every model of a key, or every key of a model


class Lease(NamedTuple):
    """One key handed out for one attempt."""

    provider: str
    key: str = ""
    model: str = ""

    @property
    def tail(self) -> str:
        return key_tail(self.key)


class Rest(NamedTuple):
    until: float  # on the pool's clock
    why: str


def key_tail(key: str) -> str:
    """What people may see of a key."""
    return key[-6:] if len(key) > 12 else "*" * len(key[-3:])


class KeyPool:
    """Which key may be used now: each rests per (key, model).

    One lock, held for dictionary work only. `now` is a monotonic clock in seconds.
    """

    MAX_RESTS: ClassVar[int] = 20_000

    def __init__(
        self,
        keys: Mapping[str, Sequence[str]],
        mode: str = "round-robin",
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = {provider: tuple(held) for provider, held in keys.items()}
        self._turns = dict.fromkeys(self._keys, 0)
        self._handed: dict[tuple[str, str], int] = {}
        self._rests: dict[tuple[str, str, str], Rest] = {}  # (provider, key, model)
        self._rotate = mode != "sequential"
        self._now = now
        self._lock = threading.Lock()

    def lease(
        self,
        provider: str,
        model: str,
        *,
        tried: Iterable[str] = (),
        ignoring: frozenset[str] = frozenset(),
    ) -> Lease | None:
        """A ready key that is not among `tried`; rests for a reason in `ignoring` do not count."""
        with self._lock:
            keys = self._keys.get(provider, ())
            start = self._turns.get(provider, 0) if self._rotate else 0
            for offset in range(len(keys)):
                key = keys[(start + offset) % len(keys)]
                if key in tried or self._resting(provider, key, model, ignoring):
                    continue
                self._turns[provider] = (start + offset + 1) % len(keys)
                self._handed[provider, key] = self._handed.get((provider, key), 0) + 1
                return Lease(provider, key, model)
        return None

    def rest(self, provider: str, key: str, model: str, seconds: float, why: str) -> None:
        """Let a key (or ANY) rest for a model (or ANY). A longer rest is never shortened."""
        with self._lock:
            place = (provider, key, model)
            until = self._now() + seconds
            if len(self._rests) >= self.MAX_RESTS:
                self._forget_over()
            old = self._rests.get(place)
            if old is None or old.until < until:
                self._rests[place] = Rest(until, why)

    def forgive(self, lease: Lease) -> None:
        """A success ends the guesses over its (key, model), not the limits that were stated."""
        if self._rests:  # the usual case costs no lock
            with self._lock:
                for key, model in self._places(lease.key, lease.model):
                    rest = self._rests.get((lease.provider, key, model))
                    if rest and rest.why in GUESSES:
                        del self._rests[lease.provider, key, model]

    def soonest(self, provider: str, model: str) -> float | None:
        """Seconds until some key of the provider is ready for the model; None without keys."""
        with self._lock:
            waits = [
                max((r.until for r in self._over(provider, key, model)), default=0.0) - self._now()
                for key in self._keys.get(provider, ())
            ]
        return max(0.0, min(waits)) if waits else None

    def why(self, provider: str, model: str) -> str:
        """Why no key is ready: the reason that keeps the key that is ready first."""
        with self._lock:
            now = self._now()
            over = (self._over(provider, key, model) for key in self._keys.get(provider, ()))
            last = [max(live) for rests in over if (live := [r for r in rests if r.until > now])]
        return min(last).why if last else ""

    def snapshot(self, provider: str, models: Sequence[str]) -> list[Json]:
        """Per key: the worst state over the provider's models, and hand-outs."""
        with self._lock:
            return [self._key_state(provider, key, models) for key in self._keys.get(provider, ())]

    def _key_state(self, provider: str, key: str, models: Sequence[str]) -> Json:
        now = self._now()
        waits = {m: self._over(provider, key, m) for m in models}
        resting = {m: max(r) for m, r in waits.items() if r and max(r).until > now}
        worst = max((r.until - now for r in resting.values()), default=0.0)
        return {
            "key_tail": key_tail(key),
            "status": "cooling" if resting else "ready",
            "ready_in": math.ceil(worst),
            "requests": self._handed.get((provider, key), 0),
            "models": {
                m: {"ready_in": math.ceil(r.until - now), "why": r.why} for m, r in resting.items()
            },
        }

    @staticmethod
    def _places(key: str, model: str) -> tuple[tuple[str, str], ...]:
        return ((key, model), (key, ANY), (ANY, model), (ANY, ANY))

    def _over(self, provider: str, key: str, model: str) -> list[Rest]:
        """The rests that lie over one (key, model), over or not."""
        found = (self._rests.get((provider, *place)) for place in self._places(key, model))
        return [rest for rest in found if rest]

    def _resting(self, provider: str, key: str, model: str, ignoring: frozenset[str]) -> bool:
        if not self._rests:
            return False
        now = self._now()
        return any(
            r.until > now and r.why not in ignoring for r in self._over(provider, key, model)
        )

    def _forget_over(self) -> None:
        """Drop rests that ended; if none did, the one that ends first."""
        now = self._now()
        kept = {place: rest for place, rest in self._rests.items() if rest.until > now}
        if len(kept) >= self.MAX_RESTS:
            kept.pop(min(kept, key=lambda place: kept[place].until))
        self._rests = kept


# =============================================================================
# 13. Breakers
# =============================================================================


class Circuit:
    """The latest outcomes of one provider and whether it is open."""

    __slots__ = ("open_until", "outcomes", "owner", "probe_until")

    def __init__(self, window: int) -> None:
        self.outcomes: deque[bool] = deque(maxlen=window)
        self.open_until = 0.0  # 0 = closed; in the past = half open
        self.probe_until = 0.0  # a probe is under way until then
        self.owner: object = None  # whose probe it is


class Breakers:
    """Which provider is resting: a sliding window of outcomes, then exactly one probe.

    Closed -> open when `min_samples` outcomes hold a share of failures >= `error_rate`;
    open for `cooldown` seconds; then one request may probe: success closes, failure re-opens.
    """

    def __init__(
        self,
        window: int = 8,
        min_samples: int = 4,
        error_rate: float = 0.5,
        cooldown: float = 60.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._window, self._min, self._rate = window, min(min_samples, window), error_rate
        self._cooldown, self._now = cooldown, now
        self._circuits: dict[str, Circuit] = {}
        self._lock = threading.Lock()

    def note(self, provider: str, ok: bool, owner: object = None) -> None:
        """Record one outcome; 429s and client faults are no outcome and are not noted.

        While open nothing counts; when half open only the probe's outcome does.
        """
        with self._lock:
            circuit = self._circuits.get(provider)
            if circuit is None:
                circuit = self._circuits[provider] = Circuit(self._window)
            if circuit.open_until:
                if self._now() >= circuit.open_until and self._owns(circuit, owner):
                    self._settle(circuit, ok)
                return
            circuit.outcomes.append(ok)
            if not ok and self._tripped(circuit):
                circuit.open_until = self._now() + self._cooldown

    def enter(self, provider: str, owner: object = None) -> bool:
        """Whether a request may go there; when half open the first caller gets the probe."""
        with self._lock:
            circuit = self._circuits.get(provider)
            if circuit is None or not circuit.open_until:
                return True
            now = self._now()
            if now < circuit.open_until or now < circuit.probe_until:
                return False
            # The owner gives it back; the time limit is for one that cannot.
            circuit.probe_until = now + max(self._cooldown, 1.0)
            circuit.owner = owner
            return True

    def leave(self, provider: str, owner: object = None) -> None:
        """Give an unused probe back: the attempt said nothing about the provider's health."""
        with self._lock:
            circuit = self._circuits.get(provider)
            if circuit and self._owns(circuit, owner):
                circuit.probe_until = 0.0

    @staticmethod
    def _owns(circuit: Circuit, owner: object) -> bool:
        return owner is None or circuit.owner is owner

    def probing(self, provider: str) -> bool:
        """Half open, and the one probe is under way."""
        circuit = self._circuits.get(provider)
        return circuit is not None and self._now() < circuit.probe_until

    def is_open(self, provider: str) -> bool:
        """Open and not yet due for a probe, or being probed by somebody else."""
        circuit = self._circuits.get(provider)
        if circuit is None or not circuit.open_until:
            return False
        now = self._now()
        return now < circuit.open_until or now < circuit.probe_until

    def bucket(self, provider: str) -> int:
        """Health from the window: 0 below 10 % failures, 1 below 50 %, else 2."""
        circuit = self._circuits.get(provider)
        if circuit is None:
            return 0
        outcomes = list(circuit.outcomes)
        if len(outcomes) < self._min:
            return 0
        share = outcomes.count(False) / len(outcomes)
        return 0 if share < 0.1 else 1 if share < 0.5 else 2

    def snapshot(self, provider: str) -> Json:
        circuit = self._circuits.get(provider) or Circuit(self._window)
        wait = circuit.open_until - self._now() if circuit.open_until else 0
        return {
            "open": bool(circuit.open_until),
            "opens_in_s": max(0, math.ceil(wait)),
            "recent_health_fails": list(circuit.outcomes).count(False),
        }

    def _tripped(self, circuit: Circuit) -> bool:
        seen = len(circuit.outcomes)
        return seen >= self._min and circuit.outcomes.count(False) / seen >= self._rate

    def _settle(self, circuit: Circuit, ok: bool) -> None:
        """The outcome of the probe."""
        circuit.probe_until = 0.0
        if ok:
            circuit.open_until = 0.0
            circuit.outcomes.clear()
        else:
            circuit.open_until = self._now() + self._cooldown


# =============================================================================
# 14. Usage
# =============================================================================


@dataclass
class Tally:
    """Counts of one provider since the start."""

    requests: int = 0
    errors: int = 0
    latency_s: float = 0.0
    answered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    unpriced: int = 0  # answers whose price is unknown: unknown is not free


class Usage:
    """What was asked, answered, failed and spent, per provider. One lock."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._tallies: dict[str, Tally] = {}
        self._statuses: dict[int, int] = {}
        self._now, self._lock = now, threading.Lock()
        self.started = now()

    def attempt(self, provider: str, ok: bool, seconds: float) -> None:
        with self._lock:
            tally = self._tallies.setdefault(provider, Tally())
            tally.requests += 1
            if ok:
                tally.answered += 1
                tally.latency_s += seconds
            else:
                tally.errors += 1

    def spent(self, provider: str, tokens: Tokens, cost: float | None) -> None:
        """Tokens of one answer and its price in USD (None = unknown)."""
        with self._lock:
            tally = self._tallies.setdefault(provider, Tally())
            tally.prompt_tokens += tokens.prompt
            tally.completion_tokens += tokens.completion
            if cost is None:
                tally.unpriced += 1
            else:
                tally.cost_usd += cost

    def answered(self, status: int) -> None:
        """One response to a client."""
        with self._lock:
            self._statuses[status] = self._statuses.get(status, 0) + 1

    def tally(self, provider: str) -> Tally:
        with self._lock:
            return replace(self._tallies.get(provider) or Tally())

    def statuses(self) -> dict[int, int]:
        with self._lock:
            return dict(self._statuses)

    @property
    def uptime_s(self) -> float:
        return self._now() - self.started


# =============================================================================
# 15. Difficulty
# =============================================================================

DIFFICULTY_LABELS = {1: "critical", 2: "complex", 3: "standard", 4: "simple", 5: "trivial"}

COMPLEX_WORDS = frozenset(
    b"implement design architect debug refactor algorithm optimize optimise analyze analyse build "
    b"develop summarize summarise compare research generate convert migrate".split()
)
# The rarest word of each phrase, looked up first, and the whole phrase.
COMPLEX_PHRASES = (
    (b"explain", b" explain how "),
    (b"plan", b" create a plan "),
    (b"tests", b" write tests "),
    (b"cases", b" test cases "),
    (b"step", b" step by step "),
    (b"walk", b" walk me through "),
    (b"understand", b" help me understand "),
)
CODE_WORDS = frozenset(b"def function class import".split())
CODE = re.compile(r"\b(?:def|function|class|import)\s", re.IGNORECASE)
SIMPLE = re.compile(
    rb" (?:what (?:is|does|year|time)|who is|define|translate|yes or no|how (?:many|old)"
    rb"|give me a number|true or false|in one word|spell|one sentence) "
)
# Letters lower-cased, digits and _ kept, all else a space: much cheaper than a regex.
WORD_BYTES = bytes(
    code if chr(code).isalnum() or code == ord("_") else 32
    for code in bytes(range(128)).lower() + b" " * 128
)
SCAN_CHARS = 3000  # of each end of a turn; what is asked stands first or last, pasted text between

# Above this many estimated tokens (characters // 4) a request is at least that hard.
CRITICAL_TOKENS, COMPLEX_TOKENS, STANDARD_TOKENS, SIMPLE_TOKENS = 2000, 800, 300, 100
# Everything but the last user turn counts a quarter, up to these ceilings: an agent's long past
# and its system prompt and tools make a request complex, only what is asked makes it critical.
HISTORY_TOKENS, BACKGROUND_TOKENS = 1200, 400
TOOL_CHARS = 200  # one tool definition without its description, roughly; measuring costs too much


@dataclass(frozen=True)
class Difficulty:
    """How hard a request is, 1 (critical) to 5 (trivial), and what made it so."""

    level: int
    why: str


def rate_difficulty(chat: Mapping[str, object]) -> Difficulty:
    """Judge `chat` by size and wording, asking nobody. What is malformed counts as absent."""
    turn, size = weigh(chat)
    if size > CRITICAL_TOKENS:
        return Difficulty(1, f"about {size} tokens")
    text = turn if len(turn) <= 2 * SCAN_CHARS else f"{turn[:SCAN_CHARS]} {turn[-SCAN_CHARS:]}"
    words = text.encode("ascii", "replace").translate(WORD_BYTES).split()
    phrased = b" %b " % b" ".join(words)
    vocabulary = frozenset(words)
    complex_word = find_complex(vocabulary, phrased)
    code = "```" in text or (not vocabulary.isdisjoint(CODE_WORDS) and CODE.search(text))
    if complex_word:
        return Difficulty(1 if code else 2, f"{'code and ' if code else ''}{complex_word!r}")
    if size > STANDARD_TOKENS:
        return Difficulty(2 if size > COMPLEX_TOKENS else 3, f"about {size} tokens")
    if code:
        return Difficulty(3, "code")
    if size > SIMPLE_TOKENS:
        return Difficulty(4, f"about {size} tokens")
    if simple := SIMPLE.search(phrased):
        return Difficulty(5, f"short, {simple[0].strip().decode()!r}")
    return Difficulty(4, "short")


def find_complex(vocabulary: frozenset[bytes], phrased: bytes) -> str:
    """A word or phrase in the text that asks for real work, or ''."""
    if found := vocabulary & COMPLEX_WORDS:
        return min(found).decode()
    hits = (phrase for word, phrase in COMPLEX_PHRASES if word in vocabulary and phrase in phrased)
    return next(hits, b"").strip().decode()


def weigh(chat: Mapping[str, object]) -> tuple[str, int]:
    """The text of the last user turn, and the weighted size of everything in tokens."""
    chat = chat if isinstance(chat, Mapping) else {}
    messages, turn = chat.get("messages"), None
    history, background = 0, tool_chars(chat.get("tools"))
    for message in reversed(messages) if isinstance(messages, (list, tuple)) else ():
        role = message.get("role") if isinstance(message, Mapping) else None
        content = message.get("content") if role else None
        if role == "user" and turn is None:
            turn = " ".join(texts_of(content))
        elif role == "system" or role == "developer":
            background += chars_of(content)
        else:
            history += chars_of(content)
    turn = turn or ""
    past = min(history // 16, HISTORY_TOKENS) + min(background // 16, BACKGROUND_TOKENS)
    return turn, len(turn) // 4 + past


def texts_of(content: object) -> Iterator[str]:
    """The text in a message's content, be it a string or a list of parts."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, (list, tuple)):
        for part in content:
            text = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(text, str):
                yield text


def chars_of(content: object) -> int:
    """How many characters of text `content` holds; nothing is joined."""
    return len(content) if isinstance(content, str) else sum(map(len, texts_of(content)))


def tool_chars(tools: object) -> int:
    """About how many characters the tool definitions take."""
    if not isinstance(tools, (list, tuple)):
        return 0
    return sum(TOOL_CHARS + description_chars(tool) for tool in tools)


def description_chars(tool: object) -> int:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    described = function.get("description") if isinstance(function, Mapping) else None
    return len(described) if isinstance(described, str) else 0


# =============================================================================
# 16. Plan
# =============================================================================

FAST_PROVIDERS: Final = frozenset({"groq", "cerebras", "sambanova", "mistral"})
# Model name prefixes of clients that were never told of this router -> whose they are.
PREFIXES: Final = (
    ("gpt-", "openai"),
    ("chatgpt-", "openai"),
    ("o1", "openai"),
    ("o3", "openai"),
    ("o4", "openai"),
    ("claude", "anthropic"),
    ("gemini", "gemini"),
    ("grok", "xai"),
    ("deepseek", "deepseek"),
)


@dataclass(frozen=True)
class Target:
    """One (provider, model) that requests can be sent to."""

    service: Service
    model: str
    facts: Model
    tools: bool
    vision: bool
    reasoning: bool
    cost: int  # coarse price: 0 free, 1 cheap ... 4 dear

    @property
    def provider(self) -> str:
        return self.service.name

    @functools.cached_property
    def label(self) -> str:
        return f"{self.service.name}/{self.model}"


class Candidate(NamedTuple):
    target: Target
    why: str


class Traits(NamedTuple):
    """What of a request decides the order; equal traits share one arrangement."""

    level: int
    tools: bool = False
    vision: bool = False
    profile: str = ""  # "", "fast" or "local"
    quick: bool = False  # small enough for fast routing
    scope: frozenset[str] = frozenset()  # providers the caller may use; empty = all


class Choice(NamedTuple):
    """What the client's `model` asks for: these first, and then, unless strict, the others."""

    lead: tuple[Target, ...] = ()
    spill: bool = True
    profile: str = ""
    why: str = "smart routing"
    echo: bool = False


class Limits(NamedTuple):
    """The size of a request against what a target takes."""

    tokens: int
    health: Callable[[str], int]  # provider -> 0 well, 1 shaky, 2 ill
    is_open: Callable[[str], bool]


Group = tuple[tuple[Target, ...], ...]  # equals within each inner tuple


def make_target(service: Service, model: str, known: ModelFacts) -> Target:
    facts = known.facts(service.name, model)
    tools = service.tools.get(model, service.tools.get("", facts.tools is not False))
    reasoning = service.reasoning.get(model, service.reasoning.get("", bool(facts.reasoning)))
    return Target(
        service, model, facts, tools, bool(facts.vision), reasoning, cost_bucket(service, facts)
    )


def cost_bucket(service: Service, facts: Model) -> int:
    """Coarse price, so that cents never beat fit; unknown is not free (it counts as dear)."""
    if service.provider.tier in ("free", "local", "subscription"):
        return 0
    if facts.price_in is None or facts.price_out is None:
        return 3
    price = facts.price_in + facts.price_out
    return next((n for n, top in enumerate((0.0, 1.0, 5.0, 20.0)) if price <= top), 4)


def arrange(targets: Sequence[Target], traits: Traits, prefer: str = "fit") -> tuple[Group, ...]:
    """Targets in order of fit: groups of equal rank, split into equals by price and speed.

    Filters for tools and vision have a safety net: where nothing qualifies, they are off.
    The caller's scope has none.
    """
    pool = [t for t in targets if not traits.scope or t.provider in traits.scope]
    if traits.profile == "local":
        pool = [t for t in pool if t.service.provider.tier == "local"]
    if traits.tools:
        pool = [t for t in pool if t.tools] or pool
    if traits.vision:
        pool = [t for t in pool if t.vision] or pool
    ranked = sorted(pool, key=lambda t: rank(t, traits, prefer))
    groups = itertools.groupby(ranked, key=lambda t: rank(t, traits, prefer)[:3])
    return tuple(
        tuple(
            tuple(equals)
            for _, equals in itertools.groupby(group, key=lambda t: rank(t, traits, prefer))
        )
        for _, group in groups
    )


def rank(target: Target, traits: Traits, prefer: str) -> tuple[int, ...]:
    """The sort key: first three parts = the group, the others = order inside it."""
    weak = target.facts.rating > traits.level
    local_first = traits.profile == "fast" and traits.level >= 3
    not_local = local_first and target.service.provider.tier != "local"
    distance = abs(target.facts.rating - traits.level)
    slow = traits.quick and target.provider not in FAST_PROVIDERS
    inner, outer = (target.cost, distance) if prefer == "price" else (distance, target.cost)
    return (int(not_local), int(weak), inner, outer, int(slow))


def plan(
    lead: Sequence[Target], groups: Sequence[Group], limits: Limits, turn: int, why: str
) -> Iterator[Candidate]:
    """Candidates in the order to try them, each with its reason; nothing is computed ahead.

    Providers whose breaker is open come only when there is nobody else; models whose window
    is too small come last; requests above a provider's ceiling are not sent there at all.
    """
    late: list[Candidate] = []
    opened: list[Candidate] = []
    seen: set[str] = set()
    yielded = False
    for candidate in itertools.chain(
        (Candidate(t, why) for t in lead), ordered(groups, limits, turn)
    ):
        target = candidate.target
        if target.label in seen or too_large(target, limits.tokens):
            continue
        seen.add(target.label)
        if limits.is_open(target.provider):
            opened.append(candidate)
        elif target.facts.window and target.facts.window < limits.tokens:
            late.append(candidate._replace(why=candidate.why + ", window too small"))
        else:
            yielded = True
            yield candidate
    yield from late
    if not yielded and not late:
        yield from (c._replace(why=c.why + ", every breaker is open") for c in opened)


def ordered(groups: Sequence[Group], limits: Limits, turn: int) -> Iterator[Candidate]:
    """Group by group: the well before the ill, equals in turn."""
    for group in groups:
        turned = [t for equals in group for t in rotated(equals, turn)]
        if any(limits.health(t.provider) for t in turned):
            turned.sort(key=lambda t: limits.health(t.provider))
        for target in turned:
            yield Candidate(target, f"rating {target.facts.rating}, cost {target.cost}")


def rotated(items: tuple[Target, ...], turn: int) -> tuple[Target, ...]:
    start = turn % len(items)
    return items[start:] + items[:start] if start else items


def too_large(target: Target, tokens: int) -> bool:
    ceiling = target.service.skip_tokens_over
    return bool(ceiling) and tokens > ceiling


class Directory:
    """Every target of this router, and what a client's `model` means (conflicts C-06)."""

    MAX_ARRANGED: ClassVar[int] = 512

    def __init__(self, config: Config) -> None:
        self._config = config
        self._known = ModelFacts(config.model_overrides)
        self.services = {s.name: s for s in config.services if not s.resting}
        self.targets = tuple(
            make_target(s, model, self._known) for s in self.services.values() for model in s.models
        )
        self._by_id: dict[str, list[Target]] = {}
        for target in self.targets:
            self._by_id.setdefault(target.model.lower(), []).append(target)
        self._aliases = [
            (pattern.strip().lower(), goal.strip())
            for pattern, _, goal in (row.partition("=") for row in config.model_aliases)
        ]
        self._arranged: dict[Traits, tuple[tuple[Group, ...], Iterator[int]]] = {}

    def facts(self, provider: str, model: str) -> Model:
        return self._known.facts(provider, model)

    def choose(self, model: str) -> Choice:
        """The ladder: router ids, provider/model, alias, configured id, prefix, else smart."""
        name = model.strip().lower()
        base, _, profile = name.rpartition(":")
        routers = {self._config.router_model_id.lower(), "hermes-router", "auto"}
        if not name or name in routers:
            return Choice()
        if base in routers and profile in ("fast", "local"):
            return Choice(profile=profile, why=f"profile {profile}")
        if name == "dummy" and self._config.echo_fallback:
            return Choice(echo=True)
        return self._named(model.strip(), name)

    def _named(self, model: str, name: str) -> Choice:
        spill = not self._config.strict_model
        steps: tuple[tuple[str, Callable[[], tuple[Target, ...]]], ...] = (
            ("named provider/model", lambda: self.explicit(model)),
            ("alias", lambda: self._aliased(name)),
            ("configured model id", lambda: tuple(self._by_id.get(name, ()))),
            ("model name prefix", lambda: self._prefixed(model)),
        )
        for why, find in steps:
            if lead := find():
                return Choice(lead, spill, why=why)
        if spill:
            return Choice()
        raise NotFound(
            f"the model {model[:200]!r} is not served here; GET /v1/models lists what is",
            param="model",
            code="model_not_found",
        )

    def explicit(self, model: str) -> tuple[Target, ...]:
        """`provider/model` or `provider:model` with a configured provider."""
        provider, mark, rest = (re.split(r"([/:])", model, maxsplit=1) + ["", ""])[:3]
        row = provider_named(provider) if mark else None
        service = self.services.get(row.name) if row else None
        if not service or not rest:
            return ()
        if model.lower() in self._by_id and rest not in service.models:
            return ()  # `openai/gpt-oss-120b` is also how other providers spell their ids
        return (self.target(service, rest),)

    def _aliased(self, name: str) -> tuple[Target, ...]:
        for pattern, goal in self._aliases:
            if fnmatch.fnmatchcase(name, pattern):
                return self.explicit(goal) or tuple(self._by_id.get(goal.lower(), ()))
        return ()

    def _prefixed(self, model: str) -> tuple[Target, ...]:
        for prefix, provider in PREFIXES:
            if model.lower().startswith(prefix) and provider in self.services:
                return (self.target(self.services[provider], model),)
        return ()

    def target(self, service: Service, model: str) -> Target:
        """The target for a model of a configured provider, whether it is listed or not."""
        if not re.fullmatch(r"[\w.\-:/@+]{1,200}", model):
            raise BadRequest(f"{model[:80]!r} is not a model id", param="model")
        found = (t for t in self._by_id.get(model.lower(), ()) if t.service is service)
        return next(found, None) or make_target(service, model, self._known)

    def arranged(self, traits: Traits) -> tuple[tuple[Group, ...], int]:
        """The arrangement for these traits and whose turn it is among equals."""
        made = self._arranged.get(traits)
        if made is None:
            if len(self._arranged) >= self.MAX_ARRANGED:
                self._arranged.clear()
            groups = arrange(self.targets, traits, self._config.route_prefer)
            made = self._arranged[traits] = (groups, itertools.count())
        return made[0], next(made[1])


# =============================================================================
# 17. Verdicts
# =============================================================================

Next = Literal["key", "model", "provider", "stop"]


@dataclass(frozen=True)
class Verdict:
    """What one outcome means: who rests for how long, does the breaker hear of it, what next.

    `rests`: "route" = this (key, model), "key" = the key for every model, "model" = the model
    for every key, "" = nobody. `counts`: True = a failure of the provider's health.
    """

    name: str
    rests: Literal["", "route", "key", "model"] = ""
    rest_s: float = 0.0
    counts: bool = False
    then: Next = "model"


class Rule(NamedTuple):
    """First match wins: a status (or range), then words in the provider's reason."""

    statuses: range | frozenset[int]
    words: re.Pattern[str] | None
    verdict: Verdict


def codes(*statuses: int) -> frozenset[int]:
    return frozenset(statuses)


RATE_WORDS: Final = re.compile(
    r"resource.?exhausted"
    r"|request limit reached"
    r"|rate.?limit"
    r"|too many requests"
    r"|quota"
    r"|overloaded",
    re.IGNORECASE,
)
# Only what says that money is gone: ordinary rate limits advertise billing pages and credits.
CREDIT_WORDS: Final = re.compile(r"insufficient.?(?:quota|balance|funds)", re.IGNORECASE)
MODEL_WORDS: Final = re.compile(
    r"model.?error|no payment|credits?\b"
    r"|not supported"
    r"|promotion has ended"
    r"|subscri"
    r"|model.{0,80}(?:not found|does not exist|not exist|decommissioned|deprecated|not available)"
    r"|(?:unknown|invalid|no such) model"
    r"|model_not_found"
    r"|not allowed to access model",
    re.IGNORECASE,
)
OVERFLOW_WORDS: Final = re.compile(
    r"context_length_exceeded"
    r"|maximum context length"
    r"|context length exceeded"
    r"|exceeds.{0,40}context (?:length|window|size)"
    r"|prompt is too long"
    r"|input is too long"
    r"|input token count.{0,40}exceeds"
    r"|exceeds the maximum number of tokens"
    r"|exceeds max length"
    r"|exceed_context_size"
    r"|prompt token count of \d+ exceeds",
    re.IGNORECASE,
)
# In a 400 only plain words about the model itself: "X is not supported with this model" is
# about the request.
NO_SUCH_MODEL: Final = re.compile(
    r"model.{0,80}(?:not found|does not exist|not exist|decommissioned|not available)"
    r"|model \S+ is not supported|(?:unknown|invalid|no such) model|model_not_found"
    r"|not allowed to access model|requested model is not supported",
    re.IGNORECASE,
)
DEAD_KEY_WORDS: Final = re.compile(
    r"api key not valid"
    r"|invalid api key"
    r"|incorrect api key"
    r"|api_key_invalid",
    re.IGNORECASE,
)

OVERFLOW: Final = Verdict("context_overflow")
RATE_LIMITED: Final = Verdict("rate_limited", "route", 60.0, then="key")
SICK: Final = Verdict("provider_error", "route", 15.0, counts=True, then="key")
BAD_ANSWER: Final = Verdict("bad_answer", "route", 30.0, counts=True)
CLIENT_FAULT: Final = Verdict("client_fault", then="stop")
MODEL_REFUSED: Final = Verdict("model_refused", "model", 3600.0)
DEAD_KEY: Final = Verdict("dead_key", "key", 3600.0, then="key")
NO_CREDIT: Final = Verdict("no_credit", "key", 3600.0, then="key")

RULES: Final = (
    Rule(codes(429), CREDIT_WORDS, NO_CREDIT),  # not where a wait is stated, see judge
    Rule(codes(429), None, RATE_LIMITED),
    Rule(codes(400, 413, 422, 500), OVERFLOW_WORDS, OVERFLOW),
    Rule(codes(400, 401), DEAD_KEY_WORDS, DEAD_KEY),
    Rule(codes(400), re.compile("degraded function", re.IGNORECASE), SICK),
    Rule(codes(400), NO_SUCH_MODEL, MODEL_REFUSED),
    Rule(codes(401, 403), MODEL_WORDS, MODEL_REFUSED),
    Rule(codes(401), None, DEAD_KEY),
    Rule(codes(402), None, NO_CREDIT),
    Rule(codes(403), None, Verdict("forbidden", "route", 600.0, then="key")),
    Rule(codes(404, 410), None, Verdict("model_gone", "model", 3600.0)),
    Rule(codes(413), None, Verdict("too_large", then="provider")),
    Rule(codes(400, 422), None, CLIENT_FAULT),
    Rule(codes(408, 409, 425, *range(500, 600)), None, SICK),
    Rule(range(300, 500), None, Verdict("unexpected_status", "route", 60.0, True, "provider")),
)
# Outcomes without a usable status. A silent or unreachable provider is not asked again with
# its other keys: they lead to the same silence.
SORTS: Final = {
    "network": Verdict("unreachable", "model", 15.0, counts=True),
    "timeout": Verdict("timeout", "model", 30.0, counts=True),
    "reset": Verdict("reset", "route", 15.0, counts=True, then="key"),
    "empty": Verdict("empty_answer", "route", 30.0, counts=True),
    "garbled": BAD_ANSWER,
}
MAX_REST_S: Final = 86_400.0


def judge(outcome: Outcome, in_ok: bool = False) -> Verdict:
    """The verdict on a failed outcome; `in_ok` = it came inside a 200.

    An error inside a 200 that names no status is a rate limit when it says so.
    """
    if outcome.sort:
        return SORTS[outcome.sort]
    if in_ok and outcome.status == 502:
        return RATE_LIMITED if RATE_WORDS.search(outcome.text) else BAD_ANSWER
    text = f"{outcome.text} {outcome.code}"
    for rule in RULES:
        if outcome.status in rule.statuses and (not rule.words or rule.words.search(text)):
            # "Insufficient quota" that comes back in a minute is a rate limit.
            return (
                RATE_LIMITED if rule.verdict is NO_CREDIT and outcome.retry_after else rule.verdict
            )
    return BAD_ANSWER


DURATION: Final = re.compile(
    r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?$"
)
PROSE: Final = re.compile(
    r"(?:try again|retry|retrying|reset\w*) (?:in|after) "
    r"((?:\d+h)?\s?(?:\d+m(?!s))?\s?(?:[\d.]+m?s)?)",
    re.I,
)
RESETS_IN: Final = re.compile(r'"(?:resets_in_seconds|retry_after)"\s*:\s*"?(\d+(?:\.\d+)?)')
RETRY_DELAY: Final = re.compile(r'"(?:retryDelay)"\s*:\s*"([\d.]+s)"')


def parse_wait(text: str, wall: float) -> float | None:
    """Seconds from a Retry-After, reset header or duration; None when it says nothing usable.

    Takes 30, 1.5, 6s, 2m59.5s, 350ms, an HTTP date, and unix times in s or ms.
    """
    text = text.strip()
    try:
        number = float(text)
    except ValueError:
        wait = parse_duration(text)
        return parse_date(text, wall) if wait is None else wait
    if not math.isfinite(number):
        return None
    if number > 1e11:
        number = number / 1000 - wall
    elif number > 1e9:
        number -= wall
    return number


def parse_duration(text: str) -> float | None:
    match = DURATION.match(text.replace(" ", ""))
    if not match or not any(match.groups()):
        return None
    hours, minutes, seconds, millis = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds + millis / 1000


def parse_date(text: str, wall: float) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp() - wall
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def stated_wait(headers: Mapping[str, str], body: bytes, wall: float) -> float | None:
    """The wait a 429 or 503 states, whole seconds from 1 to 24 h; None when it states none."""
    millis = parse_wait(headers.get("retry-after-ms", ""), 0.0)
    found = millis / 1000 if millis else parse_wait(headers.get("retry-after", ""), wall)
    if found is None:
        found = body_wait(body)
    if found is None:
        found = reset_wait(headers, wall)
    return None if found is None else max(1.0, min(float(int(found)), MAX_REST_S))


def body_wait(body: bytes) -> float | None:
    """`retryDelay: "17s"` (Gemini), resets_in_seconds (Codex), `try again in 7m12s` (Groq)."""
    text = body[:8192].decode("utf-8", "replace")
    if seconds := RESETS_IN.search(text):
        return float(seconds[1])
    match = RETRY_DELAY.search(text) or PROSE.search(text)
    return parse_duration(match[1]) if match else None


def reset_wait(headers: Mapping[str, str], wall: float) -> float | None:
    """x-ratelimit-reset headers: of what is used up, the last to come back."""
    waits = []
    for suffix in ("", "-requests", "-tokens"):
        reset = headers.get("x-ratelimit-reset" + suffix, "")
        used_up = headers.get("x-ratelimit-remaining" + suffix, "0").strip() in ("0", "0.0")
        if reset and used_up and (wait := parse_wait(reset, wall)) is not None:
            waits.append(wait)
    return max(waits, default=None)


# =============================================================================
# 18. Transport
# =============================================================================

READ_BYTES: Final = 65_536
MAX_ANSWER_BYTES: Final = 50 << 20
MAX_IDLE_S: Final = 50.0  # below the keep-alive of common front ends (60 s and more)
MAX_IDLE_PER_ORIGIN: Final = 1024
STALE: Final = (
    EOFError,
    ConnectionResetError,
    ConnectionAbortedError,
    BrokenPipeError,
    ssl.SSLEOFError,
)


class TransportError(Exception):
    """No usable HTTP answer came; `sort` is a key of SORTS."""

    def __init__(self, sort: str, text: str) -> None:
        super().__init__(text)
        self.sort, self.text = sort, text


class Guard:
    """One client request as the outside world sees it: its deadline, and whether anybody waits.

    The socket of the attempt under way can be cut from another thread: by the watchdog when
    `deadline` passes, by the server when the client goes away.
    """

    __slots__ = ("_lock", "_sock", "cut", "deadline", "gone", "hang_up", "waiting")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self.deadline = math.inf  # monotonic seconds
        self.gone = False
        self.cut = False
        self.waiting = True  # for the provider; False while the client takes what came
        self.hang_up: Callable[[], None] = self.cut_off  # on a client that does not read

    def hold(self, sock: socket.socket) -> None:
        """From now on `sock` is what gets cut. ClientGone if it is too late already."""
        with self._lock:
            self._sock = sock
        if self.gone:
            raise ClientGone
        if self.cut:
            raise TimeoutError

    def begin(self, deadline: float) -> None:
        """A new attempt, to be cut at `deadline`."""
        with self._lock:
            self.cut = False
        self.deadline, self.waiting = deadline, True

    def expire(self) -> None:
        """The deadline passed: whoever is waited for is cut off."""
        self.deadline = math.inf
        if self.waiting:
            self.cut_off()
        else:
            self.hang_up()

    def release(self) -> None:
        with self._lock:
            self._sock = None

    def client_gone(self) -> None:
        self.gone = True
        self.cut_off()

    def cut_off(self) -> None:
        """Wake whoever reads or writes the socket, with an error."""
        with self._lock:
            self.cut = True
            if self._sock is not None:
                # A TLS socket is shut below its TLS layer: no reply is wanted any more.
                with suppress(OSError, TypeError):  # TypeError: TLS inside TLS has no plain socket
                    socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def explain(self, error: Exception, sort: str) -> TransportError:
        """Why an exchange failed; ClientGone when nobody waits for it."""
        if self.gone:
            raise ClientGone from error
        if self.cut or isinstance(error, TimeoutError):
            return TransportError("timeout", "no answer in time")
        return TransportError(sort, f"{type(error).__name__}: {scrub(str(error), 200)}")


class Watchdog:
    """Cuts requests whose deadline passed: one thread, looking only while there are any."""

    TICK_S: ClassVar[float] = 0.1

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._live: set[Guard] = set()
        self._some = threading.Event()
        self._now, self._lock = now, threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, guard: Guard) -> None:
        self._live.add(guard)
        if not self._some.is_set():
            self._some.set()
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
                    self._thread.start()

    def unwatch(self, guard: Guard) -> None:
        self._live.discard(guard)

    def _run(self) -> None:
        while True:
            self._some.wait()
            time.sleep(self.TICK_S)
            now = self._now()
            for guard in self._live.copy():
                if guard.deadline <= now:
                    self._expire(guard)
            if not self._live:
                self._some.clear()
                if self._live:  # somebody came between the look and the clearing
                    self._some.set()

    @staticmethod
    def _expire(guard: Guard) -> None:
        try:
            guard.expire()
        except Exception:  # one that cannot be cut must not stop the watch over all others
            log.exception("a request past its deadline could not be cut off")


CHUNK_SIZE: Final = re.compile(rb"[0-9A-Fa-f]{1,15}")


class Dechunker:
    """HTTP/1.1 chunked coding undone: bytes in any pieces in, content out."""

    __slots__ = ("_left", "_rest", "_state", "finished", "surplus")

    def __init__(self) -> None:
        self._left = 0
        self._rest = b""
        self._state: Literal["size", "data", "gap", "trailer"] = "size"
        self.finished = False
        self.surplus = False  # bytes after the end: the connection is not to be reused

    def feed(self, data: bytes) -> bytes:
        """Content in `data`; ValueError when it is not chunked coding."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        at, out = 0, []
        while not self.finished:
            if self._state == "data":
                piece = data[at : at + self._left]
                out.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if self._left:
                    break
                self._state = "gap"
            end = data.find(b"\r\n", at)
            if end < 0:
                self._rest = data[at:]
                if len(self._rest) > 8192:
                    raise ValueError("a chunk line without an end")
                break
            if self._state == "gap" and end == at:  # the usual case, without a call
                self._state = "size"
            else:
                self._line(data[at:end])
            at = end + 2
        self.surplus = self.finished and at < len(data)
        return out[0] if len(out) == 1 else b"".join(out)

    def _line(self, line: bytes) -> None:
        """One line that is not content: a size, the gap after a chunk, a trailer."""
        if self._state == "gap":
            if line:
                raise ValueError("a chunk longer than its size")
            self._state = "size"
        elif self._state == "trailer":
            self.finished = not line
        else:
            size = line.partition(b";")[0].strip()
            if not CHUNK_SIZE.fullmatch(size):
                raise ValueError("not a chunk size")
            self._left = int(size, 16)
            self._state = "data" if self._left else "trailer"


class Head(NamedTuple):
    """Status line and headers (names in lower case) of one answer, and what came behind them."""

    status: int
    headers: dict[str, str]
    rest: bytes
    keep: bool  # the provider keeps the connection open


STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: |$)")
HEAD_END: Final = re.compile(rb"\r?\n\r?\n")
MAX_HEAD_BYTES: Final = 65_536


def read_head(sock: socket.socket) -> Head:
    """The next final answer's head; EOFError when the connection closes before its first byte.

    Written out because a third of a small request's time went into the standard library's
    way through a buffered file and the e-mail parser (bench/RESULTS.md).
    """
    data = b""
    while True:
        end = HEAD_END.search(data)
        if end is None:
            piece = sock.recv(READ_BYTES)
            if not piece:
                raise (
                    ConnectionError("the head broke off") if data else EOFError("closed unanswered")
                )
            data += piece
            if len(data) > 2 * MAX_HEAD_BYTES and not HEAD_END.search(data, 0, MAX_HEAD_BYTES):
                raise ValueError("a head larger than 64 KB")
            continue
        head = parse_head(data[: end.start()], data[end.end() :])
        if head.status >= 200:
            return head
        data = head.rest  # 100 Continue and 103 Early Hints come before the answer


def parse_head(head: bytes, rest: bytes) -> Head:
    lines = head.splitlines()
    match = STATUS_LINE.match(lines[0]) if lines else None
    if not match:
        raise ValueError(f"not HTTP: {head[:40]!r}")
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        headers[name.decode("latin-1").lower()] = value.decode("latin-1").strip()
    asked = headers.get("connection", "").lower()
    keep = "close" not in asked if match[1] == b"1" else "keep-alive" in asked
    return Head(int(match[2]), headers, rest, keep)


class Response:
    """A provider's answer whose head has arrived: status, headers, and the body as it comes."""

    def __init__(self, link: Link, head: Head, guard: Guard) -> None:
        self._link, self._head, self._guard = link, head, guard
        self.status, self.headers = head.status, head.headers
        coding = self.headers.get("content-encoding", "identity").lower()
        self._unzip = zlib.decompressobj(47) if coding in ("gzip", "deflate", "x-gzip") else None
        chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        self._chunks = Dechunker() if chunked else None
        self._left = None if chunked else self._length()  # None = not known
        self._arrived = head.rest
        self._open = True
        if self._left == 0:
            self._finish(not head.rest)

    def _length(self) -> int | None:
        if self.status in (204, 304):
            return 0
        stated = {part.strip() for part in self.headers.get("content-length", "").split(",")}
        if stated == {""}:
            return None
        length = stated.pop()
        if stated or not (length.isascii() and length.isdigit()):
            raise ValueError("a content length that is none")
        return int(length)

    def read(self, limit: int = MAX_ANSWER_BYTES) -> bytes:
        """The whole body; TransportError when it is cut short or larger than `limit`."""
        pieces, size = [], 0
        while piece := self.read1():
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                self.close()
                raise TransportError("garbled", f"an answer larger than {limit} bytes")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read1(self) -> bytes:
        """What has arrived, waiting for the first byte; b"" = the body ended as it should."""
        while self._open:
            content = self._step()
            if content:
                return content
        return b""

    def _step(self) -> bytes:
        try:
            data, self._arrived = self._arrived, b""
            content = self._decode(data or self._link.sock.recv(READ_BYTES))
            return self._inflate(content) if self._unzip and content else content
        except (OSError, ValueError, zlib.error) as error:
            self.close()
            raise self._guard.explain(error, "reset") from error

    def _inflate(self, content: bytes) -> bytes:
        """Gzip undone; a body may consist of several members."""
        out = b""
        while content and self._unzip:
            out += self._unzip.decompress(content)
            content = self._unzip.unused_data
            if self._unzip.eof:
                self._unzip = zlib.decompressobj(47)
        return out

    def _decode(self, data: bytes) -> bytes:
        """`data` without its transfer coding; notes the end of the body. b"" = closed."""
        if self._chunks is not None:
            content = self._chunks.feed(data)
            if self._chunks.finished:
                self._finish(not self._chunks.surplus)
            elif not data:
                raise ConnectionError("the answer broke off")
            return content
        if self._left is None:  # ends when the connection does
            if not data:
                if self._guard.cut:
                    raise ConnectionError("cut")
                self._finish(False)
            return data
        if not data:
            raise ConnectionError("the answer broke off")
        content, surplus = data[: self._left], len(data) > self._left
        self._left -= len(content)
        if not self._left:
            self._finish(not surplus)
        return content

    def _finish(self, reusable: bool) -> None:
        """The body is complete: the connection goes back, or away."""
        self._open = False
        self._guard.release()
        if reusable and self._head.keep:
            self._link.keep()
        else:
            self._link.close()

    def close(self) -> None:
        """Give up what has not been read; the provider sees the connection close."""
        if self._open:
            self._open = False
            self._guard.release()
            self._link.close()


class Link:
    """One connection to a provider, opened by urllib3 (TLS, proxies, happy defaults)."""

    __slots__ = ("connection", "idle_since", "origin", "sock")

    def __init__(self, origin: Origin, connection: Any) -> None:
        self.origin, self.connection = origin, connection
        self.sock: socket.socket = connection.sock
        self.idle_since = 0.0

    def keep(self) -> None:
        """Ready for the next request to the same origin."""
        self.idle_since = now = time.monotonic()
        with suppress(IndexError):  # another thread may be faster
            while now - self.origin.idle[0].idle_since > MAX_IDLE_S:
                self.origin.idle.popleft().close()
        if len(self.origin.idle) < MAX_IDLE_PER_ORIGIN:
            self.origin.idle.append(self)
        else:
            self.close()

    def usable(self, now: float) -> bool:
        """Idle for a short time only, and not closed by the other side meanwhile."""
        return now - self.idle_since < MAX_IDLE_S and self.connection.is_connected

    def close(self) -> None:
        with suppress(OSError, ssl.SSLError):
            self.connection.close()


class Origin:
    """Everything that requests to one base URL share."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url, self.host = url, parts.netloc
        self.path = parts.path.rstrip("/")
        self.idle: deque[Link] = deque()
        self.tls = parts.scheme == "https"


class Transport:
    """Sends requests to providers over kept connections. No redirect is ever followed.

    The settings of `requests` hold: HTTPS_PROXY, NO_PROXY, REQUESTS_CA_BUNDLE.
    """

    def __init__(self, connect_timeout: float) -> None:
        self._connect_timeout = connect_timeout
        self._session = requests.Session()
        self._adapter = requests.adapters.HTTPAdapter(max_retries=0)
        self._origins: dict[str, Origin] = {}
        self._pools: dict[str, Any] = {}
        self._lock = threading.Lock()

    def origin(self, url: str) -> Origin:
        with self._lock:
            return self._origins.setdefault(url, Origin(url))

    def close(self) -> None:
        """Close the kept connections; those in use close when their answer ends."""
        for origin in list(self._origins.values()):
            while origin.idle:
                origin.idle.pop().close()

    def post(
        self, origin: Origin, path: str, headers: bytes, body: bytes, guard: Guard
    ) -> Response:
        """One POST. `headers` are complete lines; TransportError when no head of an answer came.

        A kept connection that turns out closed is replaced once: nothing was answered on it.
        """
        link = self._kept(origin)
        reused = link is not None
        while True:
            link = link or self._open(origin, guard)
            try:
                return self._exchange(link, self._head(origin, path, headers, body), body, guard)
            except ClientGone:
                link.close()
                raise
            except STALE as error:
                link.close()
                guard.release()
                if not reused or guard.cut:
                    raise guard.explain(error, "reset") from error
                link, reused = None, False
            except (OSError, ValueError) as error:
                link.close()
                guard.release()
                raise guard.explain(error, "reset") from error

    def _exchange(self, link: Link, head: bytes, body: bytes, guard: Guard) -> Response:
        guard.hold(link.sock)
        try:
            if len(body) < READ_BYTES:
                link.sock.sendall(head + body)
            else:
                link.sock.sendall(head)
                link.sock.sendall(body)
        except (BrokenPipeError, ConnectionResetError) as error:
            # Refused before all of it was read: a 413 may be waiting.
            with suppress(OSError, EOFError, ValueError):
                return Response(link, read_head(link.sock)._replace(keep=False), guard)
            raise error
        return Response(link, read_head(link.sock), guard)

    def _head(self, origin: Origin, path: str, headers: bytes, body: bytes) -> bytes:
        pool = self._pools.get(origin.url)
        # A plain-HTTP proxy wants the whole URL in the request line.
        prefix = ""
        if pool and pool.proxy and not origin.tls:
            prefix = f"http://{origin.host}"
            lines = (f"{name}: {value}\r\n" for name, value in pool.proxy_headers.items())
            headers += "".join(lines).encode("latin-1")
        return b"POST %b HTTP/1.1\r\nHost: %b\r\n%bContent-Length: %d\r\n\r\n" % (
            f"{prefix}{origin.path}{path}".encode(),
            origin.host.encode(),
            headers,
            len(body),
        )

    def _kept(self, origin: Origin) -> Link | None:
        now = time.monotonic()
        while origin.idle:
            try:
                link = origin.idle.pop()
            except IndexError:  # another thread was faster
                return None
            if link.usable(now):
                return link
            link.close()
        return None

    def _open(self, origin: Origin, guard: Guard) -> Link:
        """A new connection; TransportError("network") when there is none to be had."""
        if guard.gone:
            raise ClientGone
        try:
            # urllib3's own way to a connection that is not yet in use; requests did the same
            # (`_get_conn`) for years. `_prepare_proxy` opens the tunnel through a proxy.
            pool = self._pool(origin)
            connection = pool._new_conn()
            left = guard.deadline - time.monotonic()
            connection.timeout = min(self._connect_timeout, max(left, 0.05))
            if pool.proxy and origin.tls:
                pool._prepare_proxy(connection)
            else:
                connection.connect()
        except (OSError, urllib3.exceptions.HTTPError, requests.RequestException) as error:
            raise TransportError(
                "network", f"{type(error).__name__}: {scrub(str(error), 200)}"
            ) from error
        connection.sock.settimeout(None)  # from here the watchdog keeps the time
        return Link(origin, connection)

    def _pool(self, origin: Origin) -> Any:
        """urllib3's pool for an origin, as requests would configure it from the environment."""
        with self._lock:
            pool = self._pools.get(origin.url)
        if pool is None:
            settings = self._session.merge_environment_settings(origin.url, {}, None, None, None)
            request = requests.Request("POST", origin.url).prepare()
            pool = self._adapter.get_connection_with_tls_context(
                request, settings["verify"], proxies=settings["proxies"], cert=settings["cert"]
            )
            with self._lock:
                pool = self._pools.setdefault(origin.url, pool)
        return pool


# =============================================================================
# 19. Upstream
# =============================================================================

MAX_HELD_BYTES: Final = 1 << 20  # of a stream before its first useful event
LINGER_S: Final = 0.3  # for the end of the coding after [DONE]
NOT_EVENTS: Final = (b"{", b"<", b"[")  # how JSON and HTML begin, and no event


@dataclass
class Ask:
    """One client request on its way: the body as sent and as parsed, and who asks."""

    dialect: str  # of the client: a key of DIALECTS
    raw: bytes
    body: Json
    guard: Guard
    stream: bool = False
    wants_usage: bool = False
    started: float = 0.0
    request_id: str = ""

    @property
    def is_chat(self) -> bool:
        return self.dialect == "chat"


@dataclass
class Attempt:
    """What came of sending one request to one target with one key."""

    verdict: Verdict | None  # None = it worked
    outcome: Outcome
    body: bytes = b""  # a whole answer
    content_type: str = "application/json"
    tokens: Tokens | None = None
    stream: Relay | None = None
    seconds: float = 0.0


class Relay:
    """A committed stream: an iterator of byte blocks that always gets closed."""

    def __init__(self, response: Response | None, flow: Flow, cutter: EventCutter) -> None:
        self._response, self.flow, self._cutter = response, flow, cutter
        self.patience: Callable[[float | None], None] | None = None  # limits the next wait
        self.idle_s = 0.0
        self.held = b""  # what commits the stream
        self.read_out = False  # the client got all of it
        self.on_close: Callable[[Relay], None] | None = None

    @property
    def tokens(self) -> Tokens | None:
        return self.flow.tokens

    @property
    def failure(self) -> Outcome | None:
        return self.flow.failure

    def __iter__(self) -> Relay:
        return self

    def __next__(self) -> bytes:
        if self.held:
            block, self.held = self.held, b""
            return block
        while self._response is not None:
            block = self._more(self._response)
            if block:
                return block
        self.read_out = True
        self.close()
        raise StopIteration

    def _more(self, response: Response) -> bytes:
        """The next bytes for the client, b"" when only part of an event has come."""
        flow = self.flow
        if flow.done:
            self._drain(response)
            return b""
        try:
            data = self._read(response)
            block = flow.take(self._cutter.feed(data)) if data else b""
        except ClientGone:
            self._response = None
            self.close()
            raise StopIteration from None
        except (TransportError, ValueError) as error:
            return self._break_off(response, error)
        if not data:
            self._response = None
            block = flow.end(self._cutter.rest)
        return block + self._told(response) if flow.failure else block

    def _read(self, response: Response) -> bytes:
        """What came; only the provider's silence counts against it, not a slow client's."""
        if self.patience is None:
            return response.read1()
        self.patience(self.idle_s)
        data = response.read1()
        self.patience(None)
        return data

    def _break_off(self, response: Response, error: TransportError | ValueError) -> bytes:
        """The connection failed; an answer that was whole by then is whole."""
        flow, self._response = self.flow, None
        response.close()
        if flow.finished:
            return flow.end(b"")
        sort = error.sort if isinstance(error, TransportError) else "garbled"
        flow.failure = Outcome(0, str(error), sort)
        return self._told(response)

    def _told(self, response: Response) -> bytes:
        """The client learns that the provider failed; nothing of it is read any more."""
        self._response = None
        response.close()
        problem = self.flow.failure or BROKEN
        text = f"the provider failed in the middle of its answer: {problem.text or problem.sort}"
        return self.flow.fail(Exhausted(text, code="stream_interrupted"))

    def _drain(self, response: Response) -> None:
        """After the end: read what is left of the coding so that the connection can be kept."""
        self._response = None
        if self.patience:
            self.patience(LINGER_S)
        try:
            response.read(limit=READ_BYTES)
        except TransportError:
            response.close()

    def close(self) -> None:
        """Called once by the server whatever happened; an unread rest closes the connection."""
        if self._response is not None:
            self._response.close()
            self._response = None
        if self.on_close:
            hook, self.on_close = self.on_close, None
            hook(self)


class Upstream:
    """Sends one request to one target and judges what comes back."""

    def __init__(self, config: Config, transport: Transport, now: Callable[[], float]) -> None:
        self._config, self._transport, self._now = config, transport, now
        self._heads: dict[tuple[str, str], bytes] = {}

    def send(self, target: Target, lease: Lease, ask: Ask, deadline: float) -> Attempt:
        """One attempt; `deadline` is the monotonic time when the whole request ends."""
        started = self._now()
        patience = self._config.ttft_timeout * (1 if ask.stream else 3)
        ask.guard.begin(min(started + patience, deadline))
        try:
            attempt = self._try(target, lease, ask)
        except TransportError as error:
            attempt = failed(Outcome(0, error.text, error.sort))
        ask.guard.deadline = deadline
        attempt.seconds = self._now() - started
        if attempt.stream:
            attempt.stream.patience = self._patience(ask.guard, deadline)
            attempt.stream.idle_s = self._config.stream_idle_timeout
        return attempt

    def _patience(self, guard: Guard, deadline: float) -> Callable[[float | None], None]:
        """Moves the guard's deadline: some seconds while a stream waits, else the total one."""

        def wait(seconds: float | None) -> None:
            guard.deadline = deadline if seconds is None else min(self._now() + seconds, deadline)
            guard.waiting = seconds is not None

        return wait

    def _try(self, target: Target, lease: Lease, ask: Ask) -> Attempt:
        dialect, secret = DIALECTS[ask.dialect], lease.key.encode()
        response = self._transport.post(
            self._transport.origin(target.service.url),
            dialect.path,
            self._headers(target.service, lease.key),
            self._body(target, ask),
            ask.guard,
        )
        if response.status != 200:
            return self._refused(response, secret)
        if not ask.stream:
            return whole_answer(response, dialect, secret)
        return first_useful(response, Flow(dialect, ask.wants_usage, secret))

    def _refused(self, response: Response, secret: bytes) -> Attempt:
        """A status other than 200, with the provider's reason."""
        try:
            body = masked(response.read(limit=1 << 20), secret)
        except TransportError as error:
            body = error.text.encode()
        wait = None
        if response.status in (429, 503, 529):
            wait = stated_wait(response.headers, body, time.time())
        outcome = Outcome(
            response.status, error_text(body), retry_after=wait, code=error_code(body)
        )
        return failed(outcome)

    def _headers(self, service: Service, key: str) -> bytes:
        """Header lines for one (service, key), made once."""
        made = self._heads.get((service.name, key))
        if made is None:
            lines = {
                "Content-Type": "application/json",
                "Accept": "application/json, text/event-stream",
                "Accept-Encoding": "identity",
                "User-Agent": f"hermes-router/{__version__}",
                **dict(service.headers),
            }
            if key:
                lines["Authorization"] = f"Bearer {key}"
            made = "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode(
                "latin-1"
            )
            self._heads[service.name, key] = made
        return made

    def _body(self, target: Target, ask: Ask) -> bytes:
        """The client's bytes with the edits that this target needs."""
        edits: dict[str, object] = {}
        if ask.body.get("model") != target.model:
            edits["model"] = target.model
        if ask.is_chat:
            edits |= self._chat_edits(target, ask)
        return edit_body(ask.raw, ask.body, edits) if edits else ask.raw

    def _chat_edits(self, target: Target, ask: Ask) -> dict[str, object]:
        reserve = self._config.reasoning_reserve if target.reasoning else 0
        edits = output_edits(ask.body, reserve, target.service.max_output_tokens)
        if ask.stream and not ask.wants_usage and target.service.provider.stream_options:
            options = ask.body.get("stream_options") or {}
            edits["stream_options"] = {**options, "include_usage": True}
        elif "stream_options" in ask.body and not target.service.provider.stream_options:
            edits["stream_options"] = DROP
        if target.service.provider.reasoning_replay == "reject":
            messages = without_reasoning(ask.body["messages"])
            if messages is not None:
                edits["messages"] = messages
        return edits


def failed(outcome: Outcome, in_ok: bool = False) -> Attempt:
    return Attempt(judge(outcome, in_ok), outcome)


def whole_answer(response: Response, dialect: Dialect, secret: bytes) -> Attempt:
    """A 200 read to its end and judged; its bytes are kept as they came."""
    body = response.read()
    problem, reply = dialect.judge(body)
    if problem:
        problem, _ = dialect.judge(masked(body, secret))
        return failed(problem or BROKEN, in_ok=True)
    content_type = response.headers.get("content-type", "")
    if "json" not in content_type:
        content_type = "application/json"  # deepseek sends octet-stream, others text/plain
    return Attempt(None, Outcome(200, ""), body, content_type, tokens_of(reply))


def first_useful(response: Response, flow: Flow) -> Attempt:
    """Hold a stream back until its first useful event has come: only then is it committed."""
    cutter, held, size, begun = EventCutter(), [], 0, False
    while not flow.failure and size <= MAX_HELD_BYTES:
        data = response.read1()
        if not begun and data.lstrip()[:1] in NOT_EVENTS:
            return not_a_stream(response, data, flow)
        begun = begun or bool(data.strip())
        try:
            held.append(flow.take(cutter.feed(data)) if data else flow.end(cutter.rest))
        except ValueError as error:
            flow.failure = Outcome(0, str(error), "garbled")
        size += len(held[-1])
        if flow.useful and not flow.failure:
            return committed(response if data else None, flow, cutter, b"".join(held))
        if not data:
            text = "the stream ended before its first useful event" if begun else "an empty stream"
            flow.failure = Outcome(0, text, "empty")
    response.close()
    too_long = Outcome(0, "nothing useful in the first megabyte", "garbled")
    return failed(flow.failure or too_long, in_ok=True)


def committed(response: Response | None, flow: Flow, cutter: EventCutter, held: bytes) -> Attempt:
    relay = Relay(response, flow, cutter)
    relay.held = held
    return Attempt(None, Outcome(200, ""), content_type="text/event-stream", stream=relay)


def not_a_stream(response: Response, start: bytes, flow: Flow) -> Attempt:
    """A whole answer, or an error, where a stream was asked for."""
    held = flow.adopt(start + response.read())
    if flow.failure:
        return failed(flow.failure, in_ok=True)
    return committed(None, flow, EventCutter(), held)


# =============================================================================
# 20. Router
# =============================================================================

MAX_ATTEMPTS: Final = 32


@dataclass(frozen=True)
class Caller:
    """Who asks: a name for logs and metrics (never key material), and what the key may use."""

    name: str
    scope: frozenset[str] = frozenset()  # empty = every provider

    def may_use(self, provider: str) -> bool:
        return not self.scope or provider in self.scope


@dataclass
class Answer:
    """What goes back to the client, with what the headers and the log say about it."""

    body: bytes | Relay
    content_type: str
    provider: str
    model: str
    attempts: int


@dataclass
class Walk:
    """One request's way through its candidates: what was tried and what is ruled out."""

    tried: list[tuple[str, Attempt]] = field(default_factory=list)  # (label, attempt)
    keys: dict[str, set[str]] = field(default_factory=dict)  # label -> keys tried
    out: set[str] = field(default_factory=set)  # provider names and labels ruled out
    waits: list[float] = field(default_factory=list)  # seconds until a skipped one is ready
    skipped: list[str] = field(default_factory=list)

    def rule(self, target: Target, verdict: Verdict) -> None:
        if verdict.then == "provider":
            self.out.add(target.provider)
        elif verdict.then == "model":
            self.out.add(target.label)

    def first_failure(self, label: str, attempt: Attempt) -> bool:
        """Whether this is the first failure of that model: its other keys tell nothing new."""
        counted = any(seen == label and a.verdict and a.verdict.counts for seen, a in self.tried)
        return attempt.verdict is not None and not counted

    def ruled_out(self, target: Target) -> bool:
        return target.label in self.out or target.provider in self.out

    @property
    def candidates(self) -> int:
        """How many (provider, model) were tried, whatever the number of keys."""
        return len({label for label, _ in self.tried})

    @property
    def verdicts(self) -> set[str]:
        return {a.verdict.name for _, a in self.tried if a.verdict}

    def told(self) -> list[str]:
        """Redacted lines about what happened, for the error and the log."""
        return [
            f"{label}: {a.verdict.name if a.verdict else 'ok'}"
            f" ({a.outcome.status or a.outcome.sort}) {a.outcome.text[:160]}".rstrip()
            for label, a in self.tried
        ] + self.skipped


class Gate:
    """How many requests are in flight; the one too many is told so at once."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self.inside = 0

    def enter(self) -> None:
        with self._lock:
            if self.inside >= self._most:
                raise Busy("this router holds as many requests as it may; try again", retry_after=1)
            self.inside += 1

    def leave(self) -> None:
        with self._lock:
            self.inside -= 1


class Router:
    """All state of one running router. Time and transport are passed in."""

    def __init__(
        self,
        config: Config,
        *,
        transport: Transport | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config, self.now = config, now
        self.directory = Directory(config)
        self.keys = KeyPool({s.name: s.keys for s in config.services}, config.rotation_mode, now)
        self.breakers = Breakers(
            config.breaker_window,
            config.breaker_min_samples,
            config.breaker_error_rate,
            config.breaker_cooldown,
            now,
        )
        self.usage = Usage(now)
        self.gate = Gate(config.max_streams)
        self.watchdog = Watchdog(now)
        self.encoder = Encoder()
        self.transport = transport or Transport(config.connect_timeout)
        self.upstream = Upstream(config, self.transport, now)

    def close(self) -> None:
        """Let go of the connections to providers."""
        self.transport.close()

    # -- one request -----------------------------------------------------------------------

    def complete(self, ask: Ask, caller: Caller, profile: str = "") -> Answer:
        """Answer a chat request, or raise the RouterError that says why not."""
        choice = self.directory.choose(ask.body.get("model") or "")
        if choice.echo or self.echoes:
            return echo_answer(ask)
        profile = choice.profile or profile
        tokens = self.size(ask)
        threshold = self.config.fast_route_threshold
        traits = Traits(
            rate_difficulty(ask.body).level,
            wants_tools(ask.body),
            wants_vision(ask.body),
            profile,
            0 < tokens < threshold,
            caller.scope,
        )
        groups, turn = self.directory.arranged(traits)
        lead = [t for t in choice.lead if caller.may_use(t.provider)]
        if choice.lead and not choice.spill:
            groups = ()
        limits = Limits(tokens, self.breakers.bucket, self.breakers.is_open)
        return self.answer(ask, plan(lead, groups, limits, turn, choice.why), tokens)

    def embed(self, ask: Ask, caller: Caller) -> Answer:
        """Answer an embeddings request inside one family of models, never mixing vectors."""
        family = self.embedders(str(ask.body.get("model") or ""), caller)
        if not family:
            raise Exhausted(
                "no embedding-capable providers configured"
                " (set e.g. GEMINI_API_KEYS or MISTRAL_API_KEYS)"
            )
        limits = Limits(0, self.breakers.bucket, self.breakers.is_open)
        return self.answer(ask, plan(family, (), limits, 0, "embedding family"), 0)

    def embedders(self, model: str, caller: Caller) -> list[Target]:
        """Targets of the family asked for, in configuration order; by default the first one's."""
        able = [
            self.directory.target(s, s.embed_model)
            for s in self.directory.services.values()
            if s.embed_model and caller.may_use(s.name)
        ]
        named = [t for t in able if model.lower() in (t.model.lower(), t.label.lower())]
        if not named:
            named = [t for t in self.directory.explicit(model) if caller.may_use(t.provider)]
        chosen = (named or able)[:1]
        family = {embedding_family(t.model) for t in chosen}
        return [*chosen, *(t for t in able if embedding_family(t.model) in family)]

    def answer(self, ask: Ask, candidates: Iterable[Candidate], tokens: int) -> Answer:
        """Walk the candidates until one answers; ClientGone when nobody waits any more."""
        deadline = ask.started + self.config.request_deadline
        walk, attempt = Walk(), None
        self.watchdog.watch(ask.guard)
        try:
            for target, lease in self.routes(candidates, walk, deadline, ask.guard):
                attempt = self.attempt(target, lease, ask, deadline)
                first = walk.first_failure(target.label, attempt)
                walk.tried.append((target.label, attempt))
                if attempt.verdict is None:
                    return self.deliver(target, lease, ask, attempt, walk.candidates)
                walk.rule(target, attempt.verdict)
                self.learn(target, lease, attempt, ask.guard, first)
                if attempt.verdict.then == "stop":
                    break
        except BaseException:
            self.watchdog.unwatch(ask.guard)
            if attempt and attempt.stream:  # nobody will read it
                attempt.stream.close()
            raise
        self.watchdog.unwatch(ask.guard)
        error = self.exhausted(walk, tokens, self.now() >= deadline)
        error.attempts = walk.candidates
        raise error

    def attempt(self, target: Target, lease: Lease, ask: Ask, deadline: float) -> Attempt:
        """One attempt; a probe token is given back whatever happens."""
        try:
            return self.upstream.send(target, lease, ask, deadline)
        except BaseException:
            self.breakers.leave(target.provider, ask.guard)
            raise

    def routes(
        self, candidates: Iterable[Candidate], walk: Walk, deadline: float, owner: Guard
    ) -> Iterator[tuple[Target, Lease]]:
        """(target, lease) pairs to try: every ready key of every candidate, each pair once.

        When none was left, a last round overlooks rests that were only guesses about health.
        """
        seen = []
        for target, _why in candidates:
            seen.append(target)
            yield from self.leases(target, walk, deadline, frozenset(), owner)
        for target in seen:
            yield from self.leases(target, walk, deadline, GUESSES, owner)

    def leases(
        self,
        target: Target,
        walk: Walk,
        deadline: float,
        ignoring: frozenset[str],
        owner: Guard,
    ) -> Iterator[tuple[Target, Lease]]:
        tried = walk.keys.setdefault(target.label, set())
        provider = target.provider
        while len(walk.tried) < MAX_ATTEMPTS and self.now() < deadline:
            if walk.ruled_out(target):
                return
            entered = self.breakers.enter(provider, owner)
            if not entered and (not ignoring or self.breakers.probing(provider)):
                return
            lease = self.keys.lease(provider, target.model, tried=tried, ignoring=ignoring)
            if lease is None:
                self.breakers.leave(provider, owner)
                break
            tried.add(lease.key)
            yield target, lease
        if not tried and not ignoring:
            wait = self.keys.soonest(target.provider, target.model) or 0.0
            why = self.keys.why(target.provider, target.model)
            walk.waits.append(wait)
            walk.skipped.append(f"{target.label}: resting {math.ceil(wait)} s ({why})")

    def learn(
        self, target: Target, lease: Lease, attempt: Attempt, owner: Guard, first: bool = True
    ) -> None:
        """Let rest what the verdict blames, and tell the breaker: of one model once a request."""
        verdict, outcome = attempt.verdict, attempt.outcome
        if verdict is None:
            return
        key = ANY if verdict.rests == "model" else lease.key
        model = ANY if verdict.rests == "key" else target.model
        if verdict.rests:
            seconds = outcome.retry_after or verdict.rest_s
            self.keys.rest(target.provider, key, model, seconds, verdict.name)
        if verdict.counts and first:
            self.breakers.note(target.provider, False, owner)
        self.breakers.leave(target.provider, owner)
        self.usage.attempt(target.provider, False, attempt.seconds)
        log.warning(
            "%s %s key=%s: %s (%s) %s",
            "attempt failed:",
            target.label,
            lease.tail,
            verdict.name,
            outcome.status or outcome.sort,
            outcome.text[:200],
        )

    def deliver(
        self, target: Target, lease: Lease, ask: Ask, attempt: Attempt, attempts: int
    ) -> Answer:
        """A success: health, usage, and for a stream what happens when it ends."""
        self.keys.forgive(lease)
        self.breakers.note(target.provider, True, ask.guard)
        self.usage.attempt(target.provider, True, attempt.seconds)
        answer = Answer(attempt.body, attempt.content_type, target.provider, target.model, attempts)
        if attempt.stream is None:
            self.watchdog.unwatch(ask.guard)
            self.charge(target, attempt.tokens)
            return answer
        answer.body = attempt.stream
        attempt.stream.on_close = functools.partial(self.stream_ended, target, lease, ask)
        return answer

    def stream_ended(self, target: Target, lease: Lease, ask: Ask, relay: Relay) -> None:
        """After the last byte, or after the client left."""
        self.watchdog.unwatch(ask.guard)
        self.charge(target, relay.tokens)
        if relay.failure:
            self.learn(target, lease, failed(relay.failure, in_ok=True), ask.guard)

    def charge(self, target: Target, tokens: Tokens | None) -> None:
        if tokens is None:
            return
        facts = target.facts
        cost = None
        if facts.price_in is not None and facts.price_out is not None:
            cost = (tokens.prompt * facts.price_in + tokens.completion * facts.price_out) / 1e6
        self.usage.spent(target.provider, tokens, cost)

    # -- helpers ---------------------------------------------------------------------------

    @property
    def echoes(self) -> bool:
        """Nothing is configured and the built-in echo stands in."""
        return not self.config.services and self.config.echo_fallback

    def size(self, ask: Ask) -> int:
        """The request in tokens; counted exactly only where a decision hangs on it."""
        estimate = token_bounds(text_bytes(ask.raw), ask.body)
        bounds = [
            s.skip_tokens_over for s in self.directory.services.values() if s.skip_tokens_over
        ]
        if self.config.fast_route_threshold:
            bounds.append(self.config.fast_route_threshold)
        if any(estimate.exceeds(bound) is None for bound in bounds):
            self.encoder.start()  # in the background; until it is loaded the estimate decides
            return count_tokens(ask.body, self.encoder) or estimate.likely
        return estimate.likely

    def exhausted(self, walk: Walk, tokens: int, late: bool) -> RouterError:
        """The one error that says honestly why nobody answered."""
        told, verdicts = walk.told(), walk.verdicts
        last = walk.tried[-1][1] if walk.tried else None
        statuses = {attempt.outcome.status for _, attempt in walk.tried}
        if verdicts == {OVERFLOW.name}:
            text = walk.tried[0][1].outcome.text
            return BadRequest(text, param="messages", code="context_length_exceeded", tried=told)
        if last and (last.verdict is CLIENT_FAULT or statuses <= {400, 422}):
            return BadRequest(last.outcome.text or "the provider rejected the request", tried=told)
        if not walk.tried and not walk.waits:
            return self.nobody(tokens)
        wait = self.soonest(walk)
        if statuses <= {429} and self.limits_stated(walk) and not late:
            return OverLimit(
                "every provider that could serve this is rate limited", retry_after=wait, tried=told
            )
        why = "the request's deadline passed" if late else "All providers exhausted"
        return Exhausted(f"{why}: {'; '.join(told)[:1500]}", retry_after=wait, tried=told)

    @staticmethod
    def limits_stated(walk: Walk) -> bool:
        return all(RATE_LIMITED.name in line or NO_CREDIT.name in line for line in walk.skipped)

    @staticmethod
    def soonest(walk: Walk) -> float | None:
        """Seconds until the first of those that rest is ready again."""
        waits = list(walk.waits)
        for _, attempt in walk.tried:
            if attempt.verdict and attempt.verdict.rests:
                waits.append(attempt.outcome.retry_after or attempt.verdict.rest_s)
        return min(waits, default=None)

    def nobody(self, tokens: int) -> RouterError:
        """No candidate at all: say which setting made it so."""
        if any(too_large(target, tokens) for target in self.directory.targets):
            return BadRequest(
                f"the request has about {tokens} tokens, more than any configured provider takes",
                param="messages",
                code="context_length_exceeded",
            )
        return Exhausted(
            "no provider can serve this request: none is configured, or none within the reach"
            " of this key or profile (see GET /v1/status)"
        )


# What an offer's name adds to the model's: not a size such as `:8b`, which is another model.
EMBEDDING_OFFER: Final = re.compile(r":(?:free|latest|nitro|floor)$")


def embedding_family(model: str) -> str:
    """Models whose vectors may be compared: the same id whatever the provider calls it."""
    return EMBEDDING_OFFER.sub("", model.lower().rpartition("/")[2])


ECHO_HELP: Final = (
    "This is hermes-router's built-in echo: no provider is configured yet. Add a key, for example"
    " GEMINI_API_KEY=... or GROQ_API_KEY=..., to .env and start again. You said: "
)


def echo_answer(ask: Ask) -> Answer:
    """The answer of the built-in echo, whole or streamed."""
    text = ECHO_HELP + (last_user_text(ask.body) or "(nothing)")
    head = {"id": f"chatcmpl-{ask.request_id}", "created": int(time.time()), "model": "echo"}
    message = {"role": "assistant", "content": text}
    asked, said = len(ask.raw) // 4, len(text) // 4
    usage = {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    reply = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
    if not ask.stream:
        return Answer(dump_json(reply), "application/json", "echo", "echo", 1)
    relay = Relay(None, Flow(DIALECTS["chat"], ask.wants_usage), EventCutter())
    relay.held = b"".join(echo_events(head, text, usage if ask.wants_usage else None))
    return Answer(relay, "text/event-stream", "echo", "echo", 1)


def echo_events(head: Json, text: str, usage: Json | None) -> Iterator[bytes]:
    """One event per word, a finish, usage where asked for, and the end."""

    def event(delta: Json, finish: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return encode_event({**head, "object": "chat.completion.chunk", "choices": [choice]})

    yield event({"role": "assistant", "content": ""}, None)
    for word in re.findall(r"\S+\s*|\s+", text):
        yield event({"content": word}, None)
    yield event({}, "stop")
    if usage:
        yield encode_event(
            {**head, "object": "chat.completion.chunk", "choices": [], "usage": usage}
        )
    yield DONE


# =============================================================================
# 21. Status
# =============================================================================


def snapshot(router: Router) -> Json:
    """GET /v1/status: everything an owner wants to know; keys by their last characters."""
    config = router.config
    return {
        "version": __version__,
        "mode": "echo" if router.echoes else "router",
        "uptime_s": round(router.usage.uptime_s, 1),
        "in_flight": router.gate.inside,
        "providers": {s.name: service_status(router, s) for s in config.services},
        "cache": {"enabled": False},
        "fast_routing": {
            "enabled": config.fast_route_threshold > 0,
            "threshold_tokens": config.fast_route_threshold,
            "fast_providers": sorted(FAST_PROVIDERS),
        },
        "rotation": {"mode": config.rotation_mode},
        "circuit_breaker": {
            "window": config.breaker_window,
            "min_samples": config.breaker_min_samples,
            "error_rate": config.breaker_error_rate,
            "cooldown_s": config.breaker_cooldown,
        },
        "tokenizer": "exact" if router.encoder.ready else "estimate",
        "warnings": list(config.warnings),
    }


def service_status(router: Router, service: Service) -> Json:
    name, tally = service.name, router.usage.tally(service.name)
    targets = [t for t in router.directory.targets if t.provider == name]
    return {
        "keys": router.keys.snapshot(name, service.models),
        "stats": {
            "avg_latency_ms": round(1000 * tally.latency_s / tally.answered, 1)
            if tally.answered
            else None,
            "error_rate": round(tally.errors / tally.requests, 3) if tally.requests else 0.0,
            "total_requests": tally.requests,
            "errors": tally.errors,
        },
        "breaker": router.breakers.snapshot(name),
        "tokens": tally.prompt_tokens + tally.completion_tokens,
        "cost_usd": round(tally.cost_usd, 6),
        "unpriced_answers": tally.unpriced,
        "available": not service.resting and not router.breakers.is_open(name),
        "out_of_use": service.resting or None,
        "tier": service.provider.tier,
        "model": service.models[0] if service.models else None,
        "models": list(service.models),
        "model_caps": [target_status(t) for t in targets],
        "embed_model": service.embed_model or None,
        "skip_if_tokens_over": service.skip_tokens_over,
        "max_output_tokens": service.max_output_tokens,
        "note": service.provider.note,
        **head_status(targets),
    }


def head_status(targets: Sequence[Target]) -> Json:
    """The primary model's abilities, as older clients of the status expect them."""
    if not targets:
        return {}
    first = targets[0]
    return {
        "rating": first.facts.rating,
        "supports_tools": first.tools,
        "reasoning": first.reasoning,
    }


def target_status(target: Target) -> Json:
    return {
        "model": target.model,
        "rating": target.facts.rating,
        "supports_tools": target.tools,
        "supports_vision": target.vision,
        "reasoning": target.reasoning,
        "context_window": target.facts.window,
        "cost_bucket": target.cost,
    }


def model_list(router: Router) -> list[Json]:
    """GET /v1/models: router ids first (clients take the first), then provider/model ids."""
    config = router.config
    local = any(s.provider.tier == "local" for s in config.services if not s.resting)
    profiles = ("", ":fast", ":local") if local else ("",)
    rows = [model_row(config.router_model_id + p, "hermes-router") for p in profiles]
    if config.models_list == "all":
        rows += [
            model_row(t.label, t.provider, **capabilities(t)) for t in router.directory.targets
        ]
    return rows


def model_row(model: str, owner: str, **extra: Any) -> Json:
    # `created` is a fixed date: the id does not say when the model was made.
    return {"id": model, "object": "model", "created": 1_767_225_600, "owned_by": owner, **extra}


def capabilities(target: Target) -> Json:
    return {
        "context_length": target.facts.window,
        "max_output_tokens": target.facts.max_output,
        "capabilities": {
            "tools": target.tools,
            "vision": target.vision,
            "reasoning": target.reasoning,
        },
    }


class Metric(NamedTuple):
    name: str
    kind: str
    help: str
    read: Callable[[Router], Iterable[tuple[Mapping[str, object], float]]]


def per_provider(read: Callable[[Tally], float]) -> Callable[[Router], Any]:
    """A metric with one sample per provider that was asked."""
    return lambda router: [
        ({"provider": s.name}, read(router.usage.tally(s.name))) for s in router.config.services
    ]


METRICS: Final = (
    Metric(
        "uptime_seconds", "gauge", "Seconds since the start.", lambda r: [({}, r.usage.uptime_s)]
    ),
    Metric("providers", "gauge", "Providers in use.", lambda r: [({}, len(r.directory.services))]),
    Metric("in_flight", "gauge", "Requests in flight.", lambda r: [({}, r.gate.inside)]),
    Metric(
        "circuit_breaker_open",
        "gauge",
        "1 while a provider's breaker is open.",
        lambda r: [
            ({"provider": s.name}, int(r.breakers.is_open(s.name))) for s in r.config.services
        ],
    ),
    Metric(
        "avg_latency_ms",
        "gauge",
        "Mean time to an answer, or to a stream's first useful event.",
        per_provider(lambda t: 1000 * t.latency_s / t.answered if t.answered else 0),
    ),
    Metric("requests_total", "counter", "Attempts.", per_provider(lambda t: t.requests)),
    Metric("errors_total", "counter", "Failed attempts.", per_provider(lambda t: t.errors)),
    Metric(
        "tokens_total",
        "counter",
        "Tokens used.",
        per_provider(lambda t: t.prompt_tokens + t.completion_tokens),
    ),
    Metric("cost_usd_total", "counter", "Known cost in USD.", per_provider(lambda t: t.cost_usd)),
    Metric(
        "responses_total",
        "counter",
        "Responses to clients by status.",
        lambda r: [({"status": code}, n) for code, n in sorted(r.usage.statuses().items())],
    ),
)


def prometheus(router: Router) -> str:
    """GET /metrics, text format 0.0.4: counts and timings, no key material."""
    lines = []
    for metric in METRICS:
        name = "hermes_router_" + metric.name
        lines += [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}"]
        lines += [f"{name}{labels_text(labels)} {value!r}" for labels, value in metric.read(router)]
    return "\n".join(lines) + "\n"


def labels_text(labels: Mapping[str, object]) -> str:
    escaped = (
        '{}="{}"'.format(k, str(v).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n"))
        for k, v in labels.items()
    )
    return "{" + ",".join(escaped) + "}" if labels else ""


# =============================================================================
# 22. Endpoints
# =============================================================================

PUBLIC: Final = frozenset({"/health", "/", "/favicon.ico"})
HTTP_ERRORS: Final = {404: NotFound, 405: MethodNotAllowed, 413: TooLarge, 415: UnsupportedMedia}
# The server (section 21) puts a setter here; called with a function it runs that function
# when the client's connection closes, with None it forgets it.
ON_CLOSE: Final = "hermes.on_client_close"
HANG_UP: Final = "hermes.hang_up"  # a function of the server that closes the client's connection
STREAM_HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
HARMLESS_ID: Final = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def create_app(config: Config, **parts: Any) -> flask.Flask:
    """A fresh WSGI app around a fresh Router; `parts` (transport, now) go to the Router."""
    app = flask.Flask("hermes-router", static_folder=None)
    router = Router(config, **parts)
    app.extensions["router"] = router
    door = Door(config)
    app.before_request(lambda: door.check(current_request()))
    app.register_error_handler(RouterError, lambda error: error_response(router, error))
    app.register_error_handler(HTTPException, lambda error: http_error(router, error))
    app.register_error_handler(Exception, lambda error: crash(router, error))
    add_routes(app, router)
    return app


def add_routes(app: flask.Flask, router: Router) -> None:
    """Every path, the method it answers to, and its function."""
    routes: tuple[tuple[str, str, Callable[..., Any]], ...] = (
        ("POST", "/v1/chat/completions", lambda: serve_chat(router)),
        ("POST", "/v1/embeddings", lambda: serve_embeddings(router)),
        ("GET", "/v1/models", lambda: {"object": "list", "data": model_list(router)}),
        ("GET", "/v1/models/<path:model>", lambda model: serve_model(router, model)),
        ("GET", "/v1/status", lambda: snapshot(router)),
        (
            "GET",
            "/metrics",
            lambda: flask.Response(prometheus(router), mimetype="text/plain; version=0.0.4"),
        ),
        ("GET", "/health", lambda: health(router)),
        ("GET", "/favicon.ico", lambda: ("", 204)),
        (
            "GET",
            "/",
            lambda: {"status": "ok", "message": "hermes-router is running; see /v1/models"},
        ),
    )
    for method, path, function in routes:
        app.add_url_rule(
            path,
            f"{method} {path}",
            tagged(function),
            methods=[method],
            provide_automatic_options=False,
        )


def tagged(function: Callable[..., Any]) -> Callable[..., flask.Response]:
    """Every answer carries the request's id."""

    def view(**arguments: Any) -> flask.Response:
        made = function(**arguments)
        response = made if isinstance(made, flask.Response) else flask.make_response(made)
        response.headers["X-Request-ID"] = request_id(current_request())
        return response

    return view


def current_request() -> flask.Request:
    """The request itself: every look through Flask's proxy costs a microsecond."""
    return cast(flask.Request, flask.request._get_current_object())  # type: ignore[attr-defined]


def request_id(request: flask.Request) -> str:
    """The client's own id where it is a harmless one, else a new one; the same for one request."""
    environ = request.environ
    made = environ.get("hermes.request_id")
    if made is None:
        given = environ.get("HTTP_X_REQUEST_ID", "")
        made = given if HARMLESS_ID.fullmatch(given) else "req_" + secrets.token_hex(16)
        environ["hermes.request_id"] = made
    return cast(str, made)


class Door:
    """Who may come in."""

    def __init__(self, config: Config) -> None:
        self._open = config.auth_mode == "open"
        self._public = PUBLIC if config.metrics_require_auth else PUBLIC | {"/metrics"}
        self._callers = [
            (key.encode(), Caller(f"key{n}", config.key_scopes.get(key, frozenset())))
            for n, key in enumerate(config.proxy_keys, 1)
        ]

    def check(self, request: flask.Request) -> None:
        """Before anything else of a request is looked at; Unauthorized stops it here."""
        if request.path not in self._public:
            request.environ["hermes.caller"] = self.caller(request)

    def caller(self, request: flask.Request) -> Caller:
        """The owner of the key in Authorization (with or without Bearer) or x-api-key.

        Every key is compared, in constant time, as bytes: time tells nothing about them.
        """
        environ = request.environ
        given = environ.get("HTTP_AUTHORIZATION", "") or environ.get("HTTP_X_API_KEY", "")
        scheme, _, rest = given.partition(" ")
        # WSGI hands header bytes over as Latin-1 text.
        credential = (rest if scheme.lower() == "bearer" else given).strip().encode("latin-1")
        found = None
        for key, caller in self._callers:
            if hmac.compare_digest(key, credential):
                found = caller
        if found:
            return found
        if self._open:
            return Caller("open")
        raise Unauthorized(
            "unauthorized: send one of this router's keys as `Authorization: Bearer <key>`"
        )


def health(router: Router) -> Json:
    mode = {"mode": "echo"} if router.echoes else {}
    return {"status": "ok", "providers": list(router.directory.services), **mode}


def serve_model(router: Router, model: str) -> Json:
    for row in model_list(router):
        if row["id"] == model:
            return row
    raise NotFound(
        f"the model {model[:200]!r} is not listed here", param="model", code="model_not_found"
    )


def serve_chat(router: Router) -> flask.Response:
    request = current_request()
    ask = read_ask(router, request, "chat", validate_chat)
    ask.stream = bool(ask.body.get("stream"))
    options = ask.body.get("stream_options") or {}
    ask.wants_usage = bool(options.get("include_usage"))
    profile = request.environ.get("HTTP_X_HERMES_PROFILE", "").strip().lower()
    profile = profile if profile in ("fast", "local") else ""
    caller = request.environ["hermes.caller"]
    return respond(router, request, ask, lambda: router.complete(ask, caller, profile))


def serve_embeddings(router: Router) -> flask.Response:
    request = current_request()
    ask = read_ask(router, request, "embeddings", validate_embeddings)
    return respond(
        router, request, ask, lambda: router.embed(ask, request.environ["hermes.caller"])
    )


def read_ask(
    router: Router, request: flask.Request, dialect: str, validate: Callable[[Json], None]
) -> Ask:
    """The request as sent and as parsed; BadRequest names the field that is wrong."""
    coding = request.environ.get("HTTP_CONTENT_ENCODING", "identity").lower()
    if coding not in ("", "identity"):
        raise UnsupportedMedia(f"request bodies with content encoding {coding[:40]!r} are not read")
    if (request.content_length or 0) > router.config.max_request_bytes:
        raise TooLarge(f"the request is larger than {router.config.max_request_bytes} bytes")
    raw = request.get_data(cache=False)
    body = parse_body(raw)
    validate(body)
    return Ask(dialect, raw, body, Guard(), started=router.now(), request_id=request_id(request))


def respond(
    router: Router, request: flask.Request, ask: Ask, answer: Callable[[], Answer]
) -> flask.Response:
    """Run one request inside the gate, cut when the client goes away."""
    on_close = request.environ.get(ON_CLOSE, forget)
    router.gate.enter()
    visit = Visit(router, ask, on_close)
    try:
        on_close(ask.guard.client_gone)
        ask.guard.hang_up = request.environ.get(HANG_UP, ask.guard.cut_off)
        made = answer()
    except ClientGone:
        visit.leave(499)
        return flask.Response("", 499)
    except BaseException:
        visit.leave(0)
        raise
    headers = {
        "X-Provider": made.provider,
        "X-Hermes-Model": made.model.encode("ascii", "replace").decode(),
        "X-Hermes-Attempts": str(made.attempts),
        "X-Hermes-Cache": "off",
        "Content-Type": made.content_type,
    }
    if isinstance(made.body, bytes):
        visit.leave(200, made)
        return flask.Response(made.body, 200, headers)
    body = Stream(made.body, lambda whole: visit.leave(200 if whole else 499, made))
    return flask.Response(body, 200, {**headers, **STREAM_HEADERS}, direct_passthrough=True)


def forget(_callback: Callable[[], None] | None) -> None:
    """Stands in where the server cannot tell that a client left."""


class Visit:
    """One request inside the gate; `leave` is called exactly once, whatever happens."""

    def __init__(self, router: Router, ask: Ask, on_close: Callable[..., None]) -> None:
        self._router, self._ask, self._on_close = router, ask, on_close

    def leave(self, status: int, answer: Answer | None = None) -> None:
        self._router.gate.leave()
        self._on_close(None)
        if status:
            self._router.usage.answered(status)
        if status == 499:
            log.info("%s 499 the client left", self._ask.request_id)
        elif answer:
            log.debug(
                "%s %s/%s attempts=%d %.0f ms",
                self._ask.request_id,
                answer.provider,
                answer.model,
                answer.attempts,
                1000 * (self._router.now() - self._ask.started),
            )


class Stream:
    """A streamed body; closing it, read or not, closes what feeds it."""

    def __init__(self, relay: Relay, leave: Callable[[bool], None]) -> None:
        self._relay, self._leave = relay, leave
        self._left = False

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._relay)

    def close(self) -> None:
        if not self._left:
            self._left = True
            try:
                self._relay.close()
            finally:
                self._leave(self._relay.read_out)


def error_response(router: Router, error: RouterError) -> flask.Response:
    """Any RouterError as the OpenAI error envelope."""
    response = flask.Response(
        dump_json(error_body(error)), error.status, mimetype="application/json"
    )
    response.headers["X-Request-ID"] = request_id(current_request())
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.attempts:
        response.headers["X-Hermes-Attempts"] = str(error.attempts)
    router.usage.answered(error.status)
    log.info("%s %d %s", request_id(current_request()), error.status, scrub(error.message, 300))
    return response


def http_error(router: Router, error: HTTPException) -> flask.Response:
    """Flask's own errors (no such path, wrong method) in the same envelope."""
    status = error.code or 500
    request = flask.request
    text = {
        404: f"there is no {request.method} {scrub(request.path, 200)} here",
        405: f"{request.method} is not allowed on {scrub(request.path, 200)}",
    }.get(status, error.description or error.name)
    kind = HTTP_ERRORS.get(status, BadRequest if status < 500 else RouterError)
    response = error_response(router, kind(text))
    response.status_code = status
    if status == 405 and isinstance(allowed := getattr(error, "valid_methods", None), list):
        response.headers["Allow"] = ", ".join(allowed)
    return response


def crash(router: Router, error: Exception) -> flask.Response:
    """The request boundary: a fault of ours is logged with its traceback and told as a 500."""
    log.error("%s failed", request_id(current_request()), exc_info=error)
    return error_response(router, RouterError("an internal error; the log has the details"))


# =============================================================================
# 23. Server
# =============================================================================

RESERVED_THREADS: Final = 32  # beyond MAX_STREAMS, so that /health never waits for one
THREAD_REST_S: Final = 60.0


class Workers(waitress.task.ThreadedTaskDispatcher):  # type: ignore[misc]
    """Threads that start when they are needed and leave after a minute without work.

    The newest idle thread is woken first, so the others really rest.
    """

    def __init__(self, keep: int, most: int) -> None:
        super().__init__()
        self._keep, self._most = keep, most
        self._tasks: deque[Any] = deque()
        self._idle: list[threading.Lock] = []  # each released to wake its thread
        self._count = 0
        self._closed = False
        self._guard = threading.Lock()
        self.drains = threading.BoundedSemaphore(max(1, min(8, most // 4)))

    def set_thread_count(self, count: int) -> None:
        """Waitress's wish for a fixed number is not followed."""

    def add_task(self, task: Any) -> None:
        with self._guard:
            self._tasks.append(task)
            if self._idle:
                self._idle.pop().release()
                return
            if self._count >= self._most:
                return
            self._count += 1
        try:
            threading.Thread(target=self._work, name="worker", daemon=True).start()
        except RuntimeError:  # the system gives no more threads: those there are will do it
            with self._guard:
                self._count -= 1

    def _work(self) -> None:
        wake = threading.Lock()
        wake.acquire()
        while True:
            with self._guard:
                task = self._tasks.popleft() if self._tasks else None
                if task is None and self._closed:
                    self._count -= 1
                    return
                if task is None:
                    self._idle.append(wake)
            if task is not None:
                self._run(task)
            elif not wake.acquire(timeout=THREAD_REST_S) and self._retire(wake):
                return

    def _retire(self, wake: threading.Lock) -> bool:
        """Leave after a rest, unless work came meanwhile or the kept number would be missed."""
        with self._guard:
            if wake not in self._idle:
                wake.acquire()  # it was released just now
                return False
            self._idle.remove(wake)
            if self._count <= self._keep and not self._closed:
                return False
            self._count -= 1
            return True

    @staticmethod
    def _run(task: Any) -> None:
        try:
            task.service()
        except Exception:
            log.exception("a request failed outside the app")

    def shutdown(self, cancel_pending: bool = True, timeout: float = 5) -> bool:
        with self._guard:
            self._closed = True
            pending = list(self._tasks) if cancel_pending else []
            self._tasks.clear()
            for wake in self._idle:
                wake.release()
            self._idle.clear()
        for task in pending:
            task.cancel()
        return bool(pending)


@functools.lru_cache(maxsize=2)
def http_date(second: int) -> str:
    return formatdate(second, usegmt=True)


class AppTask(waitress.task.WSGITask):  # type: ignore[misc]
    """Tells the app how to hear that the client has gone; keeps connections alive after streams.

    Waitress closes the connection after each chunked answer and sends head and body apart;
    here a connection outlives its streams, and a whole answer leaves in one piece.
    """

    wrote_header: bool = False

    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        environ[ON_CLOSE] = self.channel.on_close
        environ[HANG_UP] = self.channel.hang_up
        return environ

    def build_response_header(self) -> bytes:
        """Status line and headers; decides about chunked coding and keep-alive (RFC 9112)."""
        asked = self.request.headers.get("CONNECTION", "").lower()
        keep = asked != "close" if self.version == "1.1" else asked == "keep-alive"
        lines = [f"HTTP/{self.version} {self.status}"]
        lines += [f"{k}: {v}" for k, v in self.response_headers if k.lower() != "connection"]
        headers = {k.lower() for k, _ in self.response_headers}
        if self.content_length is not None and self.has_body and "content-length" not in headers:
            lines.append(f"Content-Length: {self.content_length}")
        if self.content_length is None and self.has_body:
            self.chunked_response = self.version == "1.1"
            keep = keep and self.chunked_response
            if self.chunked_response:
                lines.append("Transfer-Encoding: chunked")
        if not keep:
            self.close_on_finish = True
            lines.append("Connection: close")
        elif self.version == "1.0":
            lines.append("Connection: keep-alive")
        lines += ["Server: hermes-router", f"Date: {http_date(int(self.start_time))}", "", ""]
        return "\r\n".join(lines).encode("latin-1")

    def write(self, data: bytes) -> None:
        """A piece of the body, with the head in front of the first."""
        head = b"" if self.wrote_header else self.build_response_header()
        self.wrote_header = True
        if not data or not self.has_body:
            data = b""
        elif self.chunked_response:
            data = b"%X\r\n%b\r\n" % (len(data), data)
        else:
            self.content_bytes_written += len(data)
        if head or data:
            self.channel.write_soon(head + data)


class JsonErrorTask(waitress.task.ErrorTask):  # type: ignore[misc]
    """What Waitress itself refuses (too large, malformed) in the API's envelope."""

    def execute(self) -> None:
        refused = self.request.error
        kind = HTTP_ERRORS.get(refused.code, BadRequest if refused.code < 500 else RouterError)
        body = dump_json(error_body(kind(f"{refused.reason}: {refused.body}")))
        self.status = f"{refused.code} {refused.reason}"
        self.response_headers += [
            ("Content-Type", "application/json"),
            ("X-Request-ID", f"req_{secrets.token_hex(16)}"),
        ]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)
        # Few at a time: strangers who send too much must not occupy every worker.
        drains = self.channel.server.task_dispatcher.drains
        if refused.code == 413 and drains.acquire(blocking=False):
            try:
                self._drain()
            finally:
                drains.release()

    def _drain(self) -> None:
        """Read on for a moment: a client still sending would otherwise miss the answer."""
        sock, until = self.channel.socket, time.monotonic() + 2.0
        left = 64 << 20
        with suppress(OSError, ValueError):
            socket.socket.shutdown(sock, socket.SHUT_WR)
            while left > 0 and (rest := until - time.monotonic()) > 0:
                if not select.select([sock], [], [], rest)[0]:
                    return
                data = sock.recv(READ_BYTES)
                left -= len(data)
                if not data:
                    return


class Sockets(dict[int, Any]):
    """Waitress's map of sockets and its loop, with epoll keeping what each one waits for.

    Waitress tells poll() about every connection at every turn; here only those are looked at
    whose wishes may have changed. Every few seconds all are, as its housekeeping says nothing.
    """

    REFRESH_S: ClassVar[float] = 2.0

    def __init__(self) -> None:
        super().__init__()
        self._epoll = select.epoll()
        self._wanted: dict[int, int] = {}
        self._changed: deque[int | None] = deque()  # other threads append to it
        self._refreshed = 0.0

    def __setitem__(self, fd: int, part: Any) -> None:
        super().__setitem__(fd, part)
        self._changed.append(fd)

    def __delitem__(self, fd: int) -> None:
        super().__delitem__(fd)
        if self._wanted.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def touch(self, part: Any) -> None:
        """What `part` waits for may have changed; from any thread, before the loop is woken."""
        self._changed.append(part._fileno)

    def loop(self, timeout: float, **_options: Any) -> None:
        """Waitress's asyncore.loop; ends when no socket is left."""
        while self:
            self._update()
            for fd, flags in self._epoll.poll(timeout):
                if part := self.get(fd):
                    waitress.wasyncore.readwrite(part, flags)
                    self._changed.append(fd)

    def _update(self) -> None:
        now = time.monotonic()
        if now - self._refreshed > self.REFRESH_S:
            self._refreshed = now
            self._changed.extend(self)
        for _ in range(len(self._changed)):
            fd = self._changed.popleft()
            if fd is not None and (part := self.get(fd)):
                self._want(fd, self._wishes(part))

    @staticmethod
    def _wishes(part: Any) -> int:
        wanted = select.EPOLLIN if part.readable() else 0
        return wanted | (select.EPOLLOUT if part.writable() and not part.accepting else 0)

    def _want(self, fd: int, wanted: int) -> None:
        old = self._wanted.get(fd)
        if old == wanted:
            return
        with suppress(OSError):  # closed by another thread meanwhile
            if old is None:
                self._epoll.register(fd, wanted)
            else:
                self._epoll.modify(fd, wanted)
            self._wanted[fd] = wanted


class QuietServer:
    """The server as one channel sees it: the loop is woken only when it has something to do.

    Waitress wakes it after every answer, through a pipe and another thread's turn.
    """

    def __init__(self, server: Any, channel: Any) -> None:
        self._server, self._channel = server, channel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    def pull_trigger(self) -> None:
        channel = self._channel
        unsent = channel.total_outbufs_len or channel.close_when_flushed or channel.will_close
        if unsent or channel.requests:
            if isinstance(channel._map, Sockets):
                channel._map.touch(channel)
            self._server.pull_trigger()


class Channel(waitress.channel.HTTPChannel):  # type: ignore[misc]
    """A client connection that runs a callback when it closes."""

    def __init__(self, server: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(server, *arguments, **options)
        self.server = QuietServer(server, self)

    task_class = AppTask
    error_task_class = JsonErrorTask
    callback: Callable[[], None] | None = None

    def on_close(self, callback: Callable[[], None] | None) -> None:
        self.callback = callback
        if callback and not self.connected:
            callback()

    def handle_write(self) -> None:
        if self.socket is not None:  # handle_read of the same round may have closed it
            super().handle_write()

    def hang_up(self) -> None:
        """Close from another thread, also when the client does not read: the loop sees it."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def readable(self) -> bool:
        """Reads on while an answer is under way: that is how a client's leaving is noticed.

        Unlike Waitress's own rule it does not depend on pending output, so that the loop
        need not be woken after every answer.
        """
        waiting = len(self.requests) > self.adj.channel_request_lookahead
        return not (self.will_close or self.close_when_flushed or waiting)

    def write_soon(self, data: Any) -> int:
        """Send at once what the socket takes; only the rest goes through Waitress's buffers."""
        sent = 0
        with self.outbuf_lock:
            if self.connected and not self.total_outbufs_len and not self.will_close:
                with suppress(OSError):  # full, or broken: Waitress's own way deals with both
                    sent = self.socket.send(data)
        return sent if sent == len(data) else sent + cast(int, super().write_soon(data[sent:]))

    def handle_close(self) -> None:
        super().handle_close()
        callback, self.callback = self.callback, None
        if callback:
            callback()


def make_server(app: flask.Flask, config: Config) -> Any:
    """A Waitress server: `run()`, `close()`, `effective_port`. OSError if the port is taken."""
    workers = Workers(config.worker_threads, config.max_streams + RESERVED_THREADS)
    sockets: dict[int, Any] = Sockets() if hasattr(select, "epoll") else {}
    server = waitress.server.create_server(
        app,
        map=sockets,
        _dispatcher=workers,
        host=config.host,
        port=config.port,
        threads=config.worker_threads,
        max_request_body_size=config.max_request_bytes,
        asyncore_use_poll=True,
        connection_limit=4 * (config.max_streams + 256),
        backlog=1024,
        channel_timeout=120,
        cleanup_interval=15,
        channel_request_lookahead=1,
        recv_bytes=262_144,
        outbuf_high_watermark=1 << 20,  # a slow reader's stream waits instead of filling memory
        inbuf_overflow=64 << 20,
        ident="hermes-router",
        clear_untrusted_proxy_headers=True,
    )
    for part in sockets.values():
        if isinstance(part, waitress.server.BaseWSGIServer):
            part.channel_class = Channel
    if isinstance(sockets, Sockets):
        server.asyncore = sockets  # whose `loop` it runs
    return server


# =============================================================================
# 24. Documents
# =============================================================================

PER_PROVIDER: Final = (
    ("API_KEY", "one key; also _API_KEYS (comma list) and _API_KEY_2, _API_KEY_3, ..."),
    ("BASE_URL", "another address of the provider"),
    ("MODEL", "models to use, comma list, the first is the primary one"),
    ("EXCLUDE_MODELS", "model ids never used, comma list"),
    ("EMBED_MODEL", "model for /v1/embeddings; empty = none"),
    ("SKIP_TOKENS_OVER", "larger requests are not sent there; 0 = no ceiling"),
    ("MAX_OUTPUT_TOKENS", "max_tokens is lowered to this; 0 = no ceiling"),
    ("SUPPORTS_TOOLS", "0 or 1, overrides what is known; also <PROVIDER>_<MODEL>_SUPPORTS_TOOLS"),
    ("REASONING", "0 or 1, overrides what is known; also <PROVIDER>_<MODEL>_REASONING"),
)
FILE_SETTINGS: Final = (
    ("HR_HOME", "folder of .env and auth.json", "the folder of router.py"),
    ("HR_ENV_FILE", "another path for .env", ".env in HR_HOME"),
)


def setting_rows() -> list[tuple[str, str, str, str]]:
    """(group, name, default, help) of every setting."""
    return [
        (
            f.metadata["group"],
            f.metadata["env"],
            default_text(f.default),
            f.metadata["help"] + "".join(f"; also read: {n}" for n in f.metadata.get("also", ())),
        )
        for f in fields(Config)
        if "env" in f.metadata
    ]


def default_text(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return "" if value == () else f"{value:g}" if isinstance(value, float) else str(value)


def describe_env() -> str:
    """The text of .env.example."""
    lines = [
        "# Settings of hermes-router. Copy to .env and uncomment what you need.",
        "# Variables of the process win over this file. Printed by: python router.py docs env",
    ]
    for group, rows in itertools.groupby(
        sorted(setting_rows(), key=lambda r: r[0]), lambda r: r[0]
    ):
        lines += ["", f"# --- {group} ---"]
        for _, name, default, help_text in rows:
            lines += [f"# {help_text}", f"#{name}={default}"]
    lines += ["", "# --- Files ---"] if not any(r[0] == "Files" for r in setting_rows()) else [""]
    for name, help_text, default in FILE_SETTINGS:
        lines += [f"# {help_text} (default: {default}; process environment only)", f"#{name}="]
    lines += ["", "# --- Providers: a key is all that most of them need ---"]
    for row in PROVIDERS:
        names = [f"{row.key_env[0]}="] if row.key_env else [f"{row.name.upper()}_MODEL="]
        names += [f"{variable}=" for _, variable in row.extra_env]
        lines += [f"# {row.title} ({row.tier})", *(f"#{name}" for name in names)]
    lines += ["", "# For every provider, for example GROQ:"]
    for part, help_text in PER_PROVIDER:
        lines += [f"# {help_text}", f"#GROQ_{part}="]
    lines += ["# How OpenRouter shows this app", "#OPENROUTER_SITE_URL=", "#OPENROUTER_APP_NAME="]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    cells = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)
    lines = [head, ["---"] * len(head), *cells]
    return ["| " + " | ".join(line) + " |" for line in lines]


def describe_configuration() -> str:
    """The text of docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Printed by `python router.py docs configuration`; do not edit by hand.",
        "",
        "Every setting is an environment variable or a line in `.env` (the environment wins)."
        " A value that cannot be used stops the start, and every such value is named at once.",
    ]
    for group, rows in itertools.groupby(
        sorted(setting_rows(), key=lambda r: r[0]), lambda r: r[0]
    ):
        lines += ["", f"## {group}", ""]
        lines += table(
            ("variable", "default", "meaning"), ((f"`{r[1]}`", r[2], r[3]) for r in rows)
        )
    lines += ["", "## Places", ""]
    lines += table(
        ("variable", "default", "meaning"), ((f"`{n}`", d, h) for n, h, d in FILE_SETTINGS)
    )
    lines += [
        "",
        "## Providers",
        "",
        "`<PROVIDER>` is the name in capitals, for example `GROQ`.",
        "",
    ]
    lines += table(
        ("variable", "meaning"), ((f"`<PROVIDER>_{part}`", text) for part, text in PER_PROVIDER)
    )
    lines += ["", "Key variables per provider, in the order they are read (after auth.json):", ""]
    lines += table(
        ("provider", "variables"),
        (
            (
                row.name,
                ", ".join(f"`{name}`" for name in (*row.key_env, *(v for _, v in row.extra_env))),
            )
            for row in PROVIDERS
        ),
    )
    return "\n".join(lines) + "\n"


def describe_providers() -> str:
    """The text of docs/providers.md."""
    lines = [
        "# Providers",
        "",
        "Printed by `python router.py docs providers` from the table in router.py; facts drift,"
        " so each row says when it was last seen to be so.",
        "",
    ]
    lines += table(
        (
            "provider",
            "tier",
            "key variable",
            "default models",
            "free limits",
            "trains on prompts",
            "state",
        ),
        (
            (
                f"[{row.title}]({row.signup})" if row.signup else row.title,
                row.tier,
                f"`{row.key_env[0]}`" if row.key_env else "none",
                "<br>".join(row.models),
                row.free.text,
                row.trains_on_prompts,
                f"{row.state} {row.state_date}".strip(),
            )
            for row in PROVIDERS
        ),
    )
    lines += ["", "## Notes", ""]
    lines += [f"- **{row.name}**: {row.note}" for row in PROVIDERS if row.note]
    return "\n".join(lines) + "\n"


DOCUMENTS: Final = {
    "env": describe_env,
    "configuration": describe_configuration,
    "providers": describe_providers,
}


# =============================================================================
# 25. Command line
# =============================================================================

DONE_OK, FAILED, USAGE, NOT_RUNNING = 0, 1, 2, 3


@dataclass(frozen=True)
class Command:
    """One row of the command line: its name, what it does, its arguments, its function."""

    name: str
    help: str
    run: Callable[[argparse.Namespace], int]
    arguments: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = ()


def cmd_serve(_: argparse.Namespace) -> int:
    config, made = with_proxy_key(Config.from_env())
    start_logging(config)
    for warning in config.warnings:
        log.warning("%s", warning)
    if made:
        show_new_key(config, made)
    app = create_app(config)
    try:
        server = make_server(app, config)
    except (OSError, OverflowError, ValueError) as error:
        say(f"cannot listen on {config.host}:{config.port}: {error}")
        return FAILED
    tell_start(config, app.extensions["router"], getattr(server, "effective_port", config.port))
    threading.stack_size(4 << 20)  # Python 3.13 dies on deep JSON in a smaller one (musl, Windows)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(DONE_OK))
    try:
        server.run()
    finally:
        server.close()
        app.extensions["router"].close()
    return DONE_OK


def start_logging(config: Config) -> None:
    logging.basicConfig(format="%(asctime)s [%(levelname)s] %(message)s", level=config.log_level)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)


def show_new_key(config: Config, key: str) -> None:
    """Tell of the generated key: itself only to a terminal, or where it could not be kept."""
    kept = read_dotenv(config.env_file).get("PROXY_API_KEYS") == key
    if kept and not sys.stderr.isatty():
        say(f"a key for callers was written to {config.env_file.name}; `hr key` prints it")
        return
    rule = "-" * 72
    where = f"kept in {config.env_file.name}" if kept else "valid until the router stops"
    say(f"{rule}\nYour key for this router ({where}):\n\n    {key}\n{rule}")


def tell_start(config: Config, router: Router, port: int | str) -> None:
    for service in config.services:
        if service.resting:
            log.warning("%s is configured but not used: %s", service.name, service.resting)
    if router.echoes:
        log.warning("no provider is configured: the built-in echo answers (see .env.example)")
    else:
        log.info("providers: %s", ", ".join(router.directory.services) or "none")
    # Said at every LOG_LEVEL: with PORT=0 nothing else tells the address.
    level = max(log.getEffectiveLevel(), logging.INFO)
    log.log(level, "listening on %s", address(config.host, port))


def address(host: str, port: int | str) -> str:
    """Where people on this machine reach a router bound to `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def cmd_check(_: argparse.Namespace) -> int:
    config = Config.from_env()
    for warning in config.warnings:
        say(f"warning: {warning}")
    used = [s.name for s in config.services if not s.resting]
    print(f"ok: {len(used)} providers ({', '.join(used) or 'the built-in echo answers'})")
    return DONE_OK


def cmd_key(_: argparse.Namespace) -> int:
    config, made = with_proxy_key(Config.from_env())
    if made and read_dotenv(config.env_file).get("PROXY_API_KEYS") != made:
        say(f"{config.env_file.name} cannot be written: the running router made a key of its own")
        return FAILED
    if not config.proxy_keys:
        say("no key is needed: AUTH_MODE=open")
        return FAILED
    print(config.proxy_keys[0])
    return DONE_OK


def cmd_status(args: argparse.Namespace) -> int:
    config = Config.from_env()
    url = (args.url or address(config.host, config.port)).rstrip("/") + "/v1/status"
    key = config.proxy_keys[0] if config.proxy_keys else ""
    session = requests.Session()
    session.trust_env = False  # a proxy has no business between a router and its owner
    try:
        headers = {"Authorization": f"Bearer {key}"}
        answer = session.get(url, headers=headers, timeout=5, allow_redirects=False)
        status = answer.json() if answer.status_code == 200 else {}
        text = json.dumps(status, indent=2) if args.json else status_table(status)
    except (requests.RequestException, OSError, ValueError) as error:
        say(f"no router answers at {url}: {scrub(str(error), 200)}")
        return NOT_RUNNING
    except (KeyError, TypeError, AttributeError):
        if answer.status_code != 200:
            say(f"{url} answered {answer.status_code}: {error_text(answer.content)}")
            return FAILED
        say(f"no router answers at {url}: what answers there is something else")
        return NOT_RUNNING
    print(text)
    return DONE_OK


def status_table(status: Json) -> str:
    """The status as columns for people."""
    rows = [("PROVIDER", "STATE", "KEYS", "REQUESTS", "ERRORS", "TOKENS", "MODEL")]
    for name, row in status["providers"].items():
        ready = sum(key["status"] == "ready" for key in row["keys"])
        state = "resting" if row["breaker"]["open"] else "ok" if ready else "cooling"
        counts = (row["stats"]["total_requests"], row["stats"]["errors"], row["tokens"])
        keys = f"{ready}/{len(row['keys'])}"
        state = "not used" if row["out_of_use"] else state
        rows.append((name, state, keys, *map(str, counts), row["model"] or "-"))
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    head = (
        f"hermes-router {status['version']}, mode {status['mode']}, up {status['uptime_s']:.0f} s"
    )
    notes = [
        f"! {name}: {row['out_of_use']}"
        for name, row in status["providers"].items()
        if row["out_of_use"]
    ]
    return "\n".join([head, *lines, *notes, *(f"! {w}" for w in status["warnings"])])


def cmd_docs(args: argparse.Namespace) -> int:
    print(DOCUMENTS[args.document](), end="")
    return DONE_OK


def cmd_commands(_: argparse.Namespace) -> int:
    print(*(command.name for command in COMMANDS), sep="\n")
    return DONE_OK


def cmd_version(_: argparse.Namespace) -> int:
    print(f"hermes-router {__version__}")
    return DONE_OK


COMMANDS: Final = (
    Command("serve", "run the router (the default)", cmd_serve),
    Command("check", "read the configuration and name what is wrong", cmd_check),
    Command("key", "print the first key that callers may use", cmd_key),
    Command(
        "status",
        "show how the running router is doing",
        cmd_status,
        (
            (("--url",), {"help": "address of the router"}),
            (("--json",), {"action": "store_true", "help": "the status as JSON"}),
        ),
    ),
    Command(
        "docs",
        "print a generated document",
        cmd_docs,
        ((("document",), {"choices": list(DOCUMENTS)}),),
    ),
    Command("commands", "list the commands", cmd_commands),
    Command("version", "print the version", cmd_version),
)


def say(text: str) -> None:
    """A message for the person; data goes to stdout."""
    print(text, file=sys.stderr, flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="router.py", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", metavar="command")
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.help)
        for names, options in command.arguments:
            sub.add_argument(*names, **options)
        sub.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status (0 done, 1 failed, 2 wrong usage, 3 not running)."""
    words = list(sys.argv[1:] if argv is None else argv) or ["serve"]
    parser = build_parser()
    if words[0] == "help":
        parser.print_help()
        return DONE_OK
    args = parser.parse_args(words)
    try:
        return cast(int, args.run(args))
    except ConfigError as error:
        say("the configuration cannot be used:")
        for problem in error.problems:
            say(f"  {problem}")
        return FAILED
    except KeyboardInterrupt:
        return DONE_OK


if __name__ == "__main__":
    sys.exit(main())
