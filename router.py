#!/usr/bin/env python3
"""router.py: one address for many language models.

Clients speak OpenAI Chat or Responses or Anthropic Messages; the router rates how hard a
request is, walks a list of (provider, model, key) candidates until one answers, and passes
the answer on in the client's language. Failures before the first useful event stay unseen;
failures after it are told, never faked.

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
              11. Accents          chat answers of every provider made canonical
              12. Quirks           chat bodies fitted to what each provider accepts
              13. Messages in      Anthropic Messages as clients speak it
              14. Messages out     Anthropic Messages as providers speak it
              15. Responses in     OpenAI Responses as clients speak it
              16. Responses out    OpenAI Responses as providers speak it
              17. Completions      the older completions endpoint
              18. Dialects         which dialect is read how, and events on their way to the client
  MEMORY      19. Database         SQLite files: written in batches by a thread, read by anybody
              20. Keys             which key may be used, per (key, model)
              21. Accounts         subscriptions whose tokens are renewed
              22. Breakers         which provider is resting
              23. State            what of it survives a restart
              24. Usage            what was asked, answered, failed and spent
              25. Traces           what became of the latest requests, for logs, metrics and why
              26. Lessons          what refusals taught: changes to bodies, and windows
  JUDGEMENT   27. Difficulty       how hard is this request?
              28. Plan             which candidates, in what order, and why
              29. Verdicts         what an outcome means, and what rests for how long
  ACTION      30. Transport        connections to providers, cut when nobody waits any more
              31. Upstream         one attempt: send, wait for something useful, judge
              32. Checks           keys that a provider called dead, asked again in the background
              33. Router           plan, try, learn, answer
  SURFACE     34. Status           what /v1/status, /v1/models and /metrics say
              35. Dashboard        one page to see it all
              36. Endpoints        Flask: routes, auth, errors
              37. Server           Waitress: elastic workers, JSON errors, closed clients noticed
              38. Crash test       how these settings fare when providers misbehave
              39. Documents        .env.example and the printed pages of docs/
              40. Command line     serve, check, key, status, docs ...

Rooms that later releases open: Limits, Cache and Registry after Usage, Catalog after Router,
Dashboard after Status.
"""

from __future__ import annotations

import marshal
import os
import sys
from contextlib import suppress

if __name__ == "__main__" and sys.argv[1:] in ([], ["serve"]) and hasattr(os, "memfd_create"):
    # Python keeps the syntax tree of a running script, 45 MB of this one: its compiled code is
    # handed to a fresh interpreter, which takes the place of this one under the same pid.
    with suppress(OSError):  # layer: only where it is run as a script
        file = os.memfd_create("router", 0)
        with os.fdopen(os.dup(file), "wb") as copy:
            marshal.dump(sys._getframe().f_code, copy)
        os.lseek(file, 0, os.SEEK_SET)
        boot = (
            "import marshal, os, sys, types; file, path = sys.argv[1:]; sys.argv = [path, 'serve'];"
            "router = sys.modules['router'] = types.ModuleType('router'); router.__file__ = path;"
            "exec(marshal.load(os.fdopen(int(file), 'rb')), router.__dict__);"
            "sys.exit(router.main())"
        )
        options = sys.orig_argv[1 : -len(sys.argv)]
        command = [sys.executable, *options, "-c", boot, str(file), os.path.abspath(__file__)]
        os.execv(sys.executable, command)

import argparse
import base64
import bisect
import fnmatch
import functools
import hashlib
import hmac
import http.server
import itertools
import json
import logging
import logging.handlers
import math
import queue
import re
import secrets
import select
import signal
import socket
import socketserver
import ssl
import stat
import struct
import tempfile
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal, NamedTuple, Protocol, cast
from urllib.parse import SplitResult, urlsplit

import flask
import requests
import requests.adapters
import urllib3
import urllib3.exceptions
import waitress.channel
import waitress.parser
import waitress.server
import waitress.task
import waitress.wasyncore
from werkzeug.exceptions import HTTPException

__version__ = "0.1.0"

log = logging.getLogger("hermes-router")
request_log = logging.getLogger("hermes-router.requests")  # a line per request: LOG_PATH, DEBUG

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
        self.sizes = (0, 0)  # of an overflow: tokens asked for, and the most anybody takes


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


Clock = Literal["utc", "pacific", "beijing"]


@dataclass(frozen=True)
class Provider:
    """One upstream. Everything peculiar to it is a field here, never an `if` elsewhere."""

    name: str
    title: str
    url: str  # may hold {placeholders} that `extra_env` fills
    key_env: tuple[str, ...]  # singular stems, most specific first; X_KEYS and X_KEY_2 follow
    models: tuple[str, ...]  # what is asked when nothing else is configured, best first
    tier: str  # free, trial, paid, subscription or local
    dialects: tuple[str, ...] = ("chat",)  # what it speaks, the usual one first
    responses_only: str = ""  # regular expression of models that answer nothing but Responses
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
    clock: Clock = "utc"  # whose midnight ends a day's quota, and whose time unmarked dates tell
    accounts: bool = False  # its keys are accounts whose tokens are renewed (section Accounts)
    key_check: str = "/models"  # a GET that needs a valid key; "" = none does, a tiny chat does
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
        clock="pacific",
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
        key_check="/key",  # anybody may read its list
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
        key_check="",  # its list is not known to need a key
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
        clock="beijing",  # model-hotel#955
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
        key_check="",  # its list is not known to need a key
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
        key_check="",  # its list is not known to need a key
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
        key_check="",  # its list is not known to need a key
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
        key_check="",  # its list is not known to need a key
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
        key_check="",  # its list is not known to need a key
    ),
    Provider(
        "openai",
        "OpenAI",
        "https://api.openai.com/v1",
        ("OPENAI_API_KEY", "PROVIDER_KEY_OPENAI", "EXTERNAL_OPENAI_KEY"),
        ("gpt-6-luna", "gpt-6.1-terra", "gpt-5.6-luna"),
        "paid",
        dialects=("chat", "responses"),
        # answered on /responses only (OpenAI's model pages, 2026-11)
        responses_only=r"codex|deep-research|computer-use|^(?:o\d|gpt-[\d.]+)-pro",
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
        dialects=("messages",),
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
        dialects=("codex",),
        accounts=True,
        stream_options=False,  # refuses fields it does not know
        free=FreeLimits(text="the plan's 5-hour and weekly quota"),
        aliases=("chatgpt",),
        state="changed",
        state_date="2026-08-31",
        note="2026-08: gpt-5.5 and older left; proxying a plan may break OpenAI's terms.",
        signup="https://chatgpt.com",
        key_check="/models?client_version=0.0.0",  # 2026-08: hermes-agent#93295
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
        key_check="",  # llama.cpp and others list without a key
    ),
    Provider(
        "xai",
        "xAI",
        "https://api.x.ai/v1",
        ("XAI_API_KEY", "PROVIDER_KEY_XAI", "EXTERNAL_GROK_KEY"),
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
        key_check="",  # 2026-09: 200 with any key
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
        key_check="",  # has no such list
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
        key_check="",  # its list is not known to need a key
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
        key_check="",  # its list is not known to need a key
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
        key_check="",  # its list is not known to need a key
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
        key_check="",  # its list is not known to need a key
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
        key_check="",  # its list is not known to need a key
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
        key_check="",  # its list is not known to need a key
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
    number, `choices` lists the words allowed, `blank` lets an empty text stand.
    """
    shown = not extra.get("secret", False)
    row = {"env": env, "group": group, "help": help, **extra}
    return field(default=default, repr=shown, metadata=row)


CODEX_TOKEN_URL: Final = "https://auth.openai.com/oauth/token"
CODEX_CLAIM: Final = "https://api.openai.com/auth"


@dataclass(frozen=True)
class Account:
    """One ChatGPT account; its tokens are never shown."""

    id: str
    refresh_token: str = field(repr=False)
    access_token: str = field(default="", repr=False)
    last_refresh: str = ""  # "2026-11-20T00:00:00Z"


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
class Caller:
    """Who asks: the owner of one of this router's keys, and what that key may do.

    `name` is for people, logs and metrics; `id` never changes while the key stays the same, and
    is for counters and namespaces. Neither holds key material.
    """

    name: str
    id: str = ""
    key: str = field(default="", repr=False)
    scope: frozenset[str] = frozenset()  # names of providers; empty = every one
    admin: bool = False

    def may_use(self, provider: str) -> bool:
        return not self.scope or provider in self.scope


ITSELF: Final = Caller("router", "router")  # the router asks for reasons of its own


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
    admin_keys: tuple[str, ...] = setting(
        (),
        "ADMIN_KEYS",
        "Access",
        "keys that may also change settings, comma list; without any, the first caller's key may",
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
    log_path: str = setting(
        "",
        "LOG_PATH",
        "Files",
        "file that gets a line per request as well, a new one each day, 7 kept (HR_HOME)",
    )
    request_log_size: int = setting(
        500,
        "REQUEST_LOG_SIZE",
        "Server",
        "latest requests kept for /v1/logs and /v1/why, without content; 0 = none",
        low=-math.inf,
        high=100_000,
    )
    auth_file: str = setting(
        "auth.json", "ROUTER_AUTH_FILE", "Files", "JSON file with provider keys (HR_HOME)"
    )
    state_file: str = setting(
        "router_state.json",
        "ROUTER_STATE_FILE",
        "Files",
        "rests, dead keys and breakers, kept over a restart (HR_HOME); set to nothing = not kept",
        also=("STATE_FILE",),
        blank=True,
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
    ttft_switch: float = setting(
        12.0,
        "TTFT_SWITCH",
        "Timeouts",
        "seconds until a silent stream is given up while others can be asked; 0 = TTFT_TIMEOUT;"
        " one more per 4,000 tokens, never for local servers",
    )
    stream_idle_timeout: float = setting(
        120.0, "STREAM_IDLE_TIMEOUT", "Timeouts", "seconds of silence inside a stream", low=0.01
    )
    drain_timeout: float = setting(
        30.0,
        "DRAIN_TIMEOUT",
        "Timeouts",
        "seconds that requests under way get to end when the router is stopped",
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
    rescue: bool = setting(
        True,
        "RESCUE",
        "Routing",
        "another provider goes on with a text stream that broke off; 0 = an error ends it",
    )
    content_filter_failover: bool = setting(
        False,
        "CONTENT_FILTER_FAILOVER",
        "Routing",
        "1 = what a provider's content filter refuses is tried at the next one",
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
        60.0,
        "BREAKER_COOLDOWN",
        "Breaker",
        "seconds it stays open before one probe, at most; 15 at first, longer while probes fail",
    )
    key_recheck: bool = setting(
        True,
        "KEY_RECHECK",
        "Routing",
        "a key that a provider called invalid is asked again in the background; 0 = never",
    )
    codex_token_url: str = setting(
        CODEX_TOKEN_URL,
        "CODEX_TOKEN_URL",
        "Access",
        "where tokens of ChatGPT accounts are renewed",
    )
    services: tuple[Service, ...] = ()
    accounts: tuple[Account, ...] = ()
    key_rows: Mapping[str, Json] = field(default_factory=dict, repr=False)  # of auth.json
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
        accounts = read_accounts(auth)
        services = read_services(reader, auth, values["port"], accounts)
        rows = read_key_rows(auth)
        known = (*values["proxy_keys"], *rows, *values["admin_keys"])
        values["proxy_keys"] = tuple(dict.fromkeys(k for k in known if k not in PLACEHOLDER_KEYS))
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
            accounts=accounts,
            key_rows=MappingProxyType(rows),
            model_overrides=MappingProxyType(overrides),
            home=home,
            env_file=env_file,
            warnings=tuple(reader.warnings),
        )

    @property
    def callers(self) -> tuple[Caller, ...]:
        """The owners of the proxy keys; without any admin the first of them is one."""
        rows = [(key, self.key_rows.get(key, {})) for key in self.proxy_keys]
        admins = {key for key, row in rows if row.get("admin") is True} | {*self.admin_keys}
        return tuple(
            Caller(
                name=row.get("name") or f"key{n}",
                id=caller_id(key),
                key=key,
                scope=read_scope(row.get("allowed_providers")),
                admin=key in admins if admins else n == 1,
            )
            for n, (key, row) in enumerate(rows, 1)
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
        if text is None and meta.get("blank") and any(name in self.env for name in names):
            return ""
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


def read_key_rows(auth: Json) -> dict[str, Json]:
    """auth.json `proxy_keys`: key -> what is said of it."""
    found = auth.get("proxy_keys")
    rows = found.items() if isinstance(found, dict) else ()
    return {
        key.strip(): {**row, "name": read_name(row.get("name"))} if isinstance(row, dict) else {}
        for key, row in rows
        if key.strip()
    }


def read_name(name: object) -> str:
    """A name as logs and metrics may show it."""
    text = name if isinstance(name, str) else ""
    return "".join(filter(str.isprintable, text)).strip()[:80]


def caller_id(key: str) -> str:
    return hashlib.sha256(b"hermes-router caller\0" + key.encode()).hexdigest()[:16]


def read_scope(allowed: object) -> frozenset[str]:
    """Provider names; what cannot be read lets nobody through instead of everybody."""
    if allowed is None or allowed == []:
        return frozenset()
    names = [n for n in allowed if isinstance(n, str)] if isinstance(allowed, list) else []
    return frozenset(p.name if (p := provider_named(n)) else n for n in names) or frozenset({""})


def read_accounts(document: Json) -> tuple[Account, ...]:
    """The usable accounts of an auth.json, each once: they have a refresh token and an id.

    Rows stand in `codex_accounts` or `providers.codex`, flat or as Codex CLI writes them
    ({"tokens": {...}, "last_refresh"}); a whole file of Codex CLI is one such row.
    """
    accounts: dict[str, Account] = {}
    for row in account_rows(document):
        account = read_account(row)
        if account:
            accounts.setdefault(account.id, account)
    return tuple(accounts.values())


def account_rows(document: Json) -> list[Json]:
    """The objects in an auth.json that may be accounts; they are its own, not copies."""
    providers = document.get("providers")
    named = providers.get("codex") if isinstance(providers, dict) else None
    places = (document.get("codex_accounts"), named, document)
    rows = [row for place in places for row in (place if isinstance(place, list) else [place])]
    return [row for row in rows if isinstance(row, dict) and "refresh_token" in token_holder(row)]


def token_holder(row: Json) -> Json:
    """Where a row keeps its tokens: in itself, or in `tokens` as Codex CLI does."""
    inner = row.get("tokens")
    return inner if isinstance(inner, dict) else row


def read_account(row: Json) -> Account | None:
    holder = token_holder(row)
    names = ("account_id", "access_token", "refresh_token", "id_token")
    id, access, refresh, identity = (
        value.strip() if isinstance(value := holder.get(name), str) else "" for name in names
    )
    id = id or claimed_account(access) or claimed_account(identity)
    if not refresh or not re.fullmatch(r"[!-~]+", id):  # it goes into a header
        return None
    last = row.get("last_refresh")
    return Account(id, refresh, access, last if isinstance(last, str) else "")


def jwt_claims(token: str) -> Json:
    """What a JWT says, its signature unchecked; {} for anything that is no JWT."""
    parts = token.split(".")
    if len(parts) != 3:
        return {}
    try:
        text = base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
        claims = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return claims if isinstance(claims, dict) else {}


def claimed_account(token: str) -> str:
    claim = jwt_claims(token).get(CODEX_CLAIM)
    found = claim.get("chatgpt_account_id") if isinstance(claim, dict) else ""
    return found if isinstance(found, str) else ""


def read_services(
    reader: SettingsReader, auth: Json, port: int, accounts: Sequence[Account]
) -> tuple[Service, ...]:
    """Every provider that has what it needs: a key, or, where none is needed, being asked for."""
    stored = auth.get("providers")
    stored = stored if isinstance(stored, dict) else {}
    made = (read_service(reader, row, stored, port, accounts) for row in PROVIDERS)
    return tuple(service for service in made if service)


def read_service(
    reader: SettingsReader, row: Provider, stored: Json, port: int, accounts: Sequence[Account]
) -> Service | None:
    prefix = row.name.upper()
    pairs = read_keys(reader, row, stored) + [
        (account.id, "auth.json") for account in accounts if row.accounts
    ]
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
                if owner_of(stem, key) is row:
                    found.setdefault(key, variable)
    for key in [k for k in found if not (k.isascii() and k.isprintable() and " " not in k)]:
        source = found.pop(key)
        reader.warnings.append(f"a {row.name} key from {source} is ignored: not printable ASCII")
    return list(found.items())


def owner_of(stem: str, key: str) -> Provider:
    """Whose key it is: a variable that two providers read goes by how their keys begin."""
    rows = [row for row in PROVIDERS if stem in row.key_env]
    known = (row for row in rows if row.key_prefix and key.startswith(row.key_prefix))
    return next(known, rows[0])


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
    """Compact UTF-8 JSON; half a surrogate pair, which is not UTF-8, stays the escape it was."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


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
    # What precedes a value that is a secret; it stays, the value goes.
    r"(?i)((?:api[-_ ]?key|token|secret|password|authorization)(?: provided)?[\"']?\s?[:=]\s?[\"']?"
    r"(?:bearer )?|\bbearer )(?=\S*\d)[^\s\"'&,;]{8,}"
    r"|(?<=key=)[^&\s\"']+"
    r"|(?<=bearer )\S{20,}"
    # Keys by their first letters, also half hidden by stars.
    r"|\b(?:sk|gsk|csk|xai|nvapi|hf|gh[opsu]|github_pat|glpat|key|pk|rk|r8|fw|tgp|pplx|tvly)[-_]"
    r"(?=[\w\-.*]*[\d*])[\w\-.*]{10,}"
    r"|\bAIza[\w\-*]{10,}|\bA[KS]IA[0-9A-Z]{12,}|\bya29\.[\w\-.]{10,}"
    r"|\beyJ[\w\-]{8,}\.[\w\-]{4,}(?:\.[\w\-]*)?"
    # Bare ones (mistral, cohere, together, zai): letters and digits without any order.
    r"|\b(?=[a-z]*\d)(?=\d*[a-z])[a-z0-9]{32,}(?:\.[a-z0-9]{8,})?\b"
)
# Never relayed nor logged: control characters, line ends, what turns text around, lone surrogates.
UNPRINTABLE: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ud800-\udfff]"
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
    retry_after: float | None = None  # seconds, as stated
    code: str = ""  # the provider's machine-readable words for it
    resets_at: float | None = None  # unix seconds, where a date is stated inside a 200


def read_json(body: bytes | str) -> Any:
    """The JSON value in `body`, or None. A gateway's padding in front is tolerated."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def scrub(text: str, limit: int = 600) -> str:
    """One line of at most `limit` characters: nothing that looks like a key, no control codes."""
    text = text.lstrip()
    words = UNPRINTABLE.sub(" ", text[: 4 * limit]).split()
    if words and len(text) > 4 * limit:
        last = words.pop()  # it may end in half a key, which nothing would recognise
        words = words or [last[:-200]]
    return SECRET.sub(r"\g<1>[redacted]", " ".join(words))[:limit]


# --- what an error says ---

# Where servers put the reason, the usual place first. Beside the recorded shapes (dialects.md 5):
# Azure and AWS write Message, MiniMax base_resp.status_msg, Apigee fault.faultstring.
MESSAGE_NAMES: Final = (
    "error", "message", "detail", "errors", "msg", "Message", "error_description", "error_message",
    "error_msg", "status_msg", "base_resp", "fault", "faultstring", "response", "title",
)  # fmt: skip
# Where servers put machine-readable words, and where such places lie. Google's quotaId is in
# error.details[].violations[] (gemini-cli#8437), Azure's filter in error.innererror.code.
CODE_NAMES: Final = (
    "code", "type", "status", "reason", "quotaId", "error_code", "error_type", "status_code",
    "limit_source", "__type",
)  # fmt: skip
CODE_HOLDERS: Final = (
    "error", "errors", "details", "violations", "innererror", "metadata", "base_resp", "fault",
    "response", "raw", "message",
)  # fmt: skip
MAX_CODE_WORDS: Final = 40
# The status that a word stands for, where an error inside a 200 gives no number. Not among them:
# words that servers use for anything (server_error, api_error, invalid_request_error).
STATUS_WORDS: Final[Mapping[str, int]] = {
    "invalid_prompt": 400,
    "invalid_argument": 400,
    "failed_precondition": 400,
    "context_length_exceeded": 400,
    "content_filter": 400,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "unauthenticated": 401,
    "billing_error": 402,
    "permission_error": 403,
    "permission_denied": 403,
    "not_found_error": 404,
    "model_not_found": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "rate_limited": 429,
    "too_many_requests": 429,
    "too_many_requests_error": 429,
    "resource_exhausted": 429,
    "insufficient_quota": 429,
    "usage_limit_reached": 429,
    "server_is_overloaded": 503,
    "engine_overloaded_error": 503,
    "slow_down": 503,
    "unavailable": 503,
    "deadline_exceeded": 504,
    "overloaded_error": 529,
}


def error_value(body: bytes) -> Any:
    """The JSON value of an error body: alone, in a string, in an event, or on the first line."""
    value = read_json(body)
    if value is None:
        lines = body[:READ_AHEAD].splitlines()
        stripped = (line.removeprefix(b"data:").strip() for line in lines)
        found = (read_json(line) for line in stripped if line[:1] in (b"{", b"["))
        value = next((event for event in found if event), None)
    return read_json(value) or value if isinstance(value, str) else value


READ_AHEAD: Final = 65_536  # bytes of an error body that are looked through for an event


def error_text(body: bytes) -> str:
    """The reason inside an error body of any known shape, on one line, without secrets.

    Shapes (seen in recorded traffic): {error: {message}}, [{error: ...}], {error: "text"},
    {message}, {detail: "text" or list}, {errors: [{message}]}, {title, status}, JSON inside
    error.metadata.raw or in a string, the events of a stream, HTML, plain text. The content type
    is not asked: deepseek calls JSON octet-stream.
    """
    value = error_value(body)
    text = body[:4000].decode("utf-8", "replace").strip(" \t\r\n\ufeff")
    if value is not None:
        return scrub(dig_message(value) or text)
    return scrub(page_text(text) if text[:1] == "<" else text)


def page_text(page: str) -> str:
    """What an HTML or XML page is about."""
    small = page.lower()
    for name in ("title", "message", "h1"):
        start = small.find(">", small.find(f"<{name}")) + 1 if f"<{name}" in small else 0
        end = small.find("<", start)
        if start and page[start:end].strip():
            return f"an HTML page: {page[start:end]}"
    return "an HTML page"


def dig_message(value: Any, depth: int = 6) -> str:
    """The most specific message text inside an error value."""
    if isinstance(value, str):
        inner = packed_json(value) if depth else None
        return (dig_message(inner, depth - 1) if inner is not None else "") or value
    if not depth:
        return ""
    if isinstance(value, list):
        return next((text for item in value[:5] if (text := dig_message(item, depth - 1))), "")
    if not isinstance(value, dict):
        return ""
    found = (dig_message(value.get(name), depth - 1) for name in MESSAGE_NAMES)
    text = next(filter(None, found), "")
    if isinstance(place := value.get("loc"), list) and text:  # FastAPI: where it is wrong
        text = f"{'.'.join(str(part)[:80] for part in place[:8])}: {text}"
    more = closer_message(value, depth - 1)
    return f"{text}: {more}" if text and more and more not in text else text or more


def packed_json(text: str) -> Any:
    """The value of JSON in a string; None for other text. Gateways pack errors up like that."""
    return read_json(text) if text[:64].lstrip()[:1] in ("{", "[") else None


def closer_message(value: Json, depth: int) -> str:
    """What stands beside a general message and says more, or ''."""
    metadata = value.get("metadata")
    if isinstance(metadata, dict) and metadata.get("raw"):  # OpenRouter: the provider's own words
        return dig_message(metadata["raw"], depth)
    if isinstance(value.get("error"), str):  # OAuth; Spring, whose `error` is the status phrase
        names = ("message", "error_description", "detail")
        texts = (value[name] for name in names if isinstance(value.get(name), str))
        if text := next(texts, ""):
            return text
    for name in ("details", "errors"):  # Venice: details._errors; Rails: errors by field
        if isinstance(value.get(name), dict) and (text := first_text(value[name], depth)):
            return text
    return ""


def first_text(value: Any, depth: int) -> str:
    """The first text inside `value`, with the names that lead to it."""
    if isinstance(value, str):
        return value
    if not depth or not value or not isinstance(value, (dict, list)):
        return ""
    if isinstance(value, list):
        return next((text for item in value[:5] if (text := first_text(item, depth - 1))), "")
    for name, inner in value.items():
        if text := first_text(inner, depth - 1):
            return text if name.startswith("_") else f"{name[:80]}: {text}"
    return ""


def error_code(body: bytes) -> str:
    """The machine-readable words of an error body, for the rules only."""
    return error_words(error_value(body))


def error_words(value: Any) -> str:
    """Codes, types and quota names inside an error value. A number that is no HTTP status is
    written #1302, so that rules can tell it from one in a sentence."""
    return " ".join(itertools.islice(code_words(value, 10), MAX_CODE_WORDS))[:600]


def code_words(value: Any, depth: int) -> Iterator[str]:
    value = packed_json(value) if isinstance(value, str) else value
    if not depth:
        return
    if isinstance(value, list):
        for item in value[:8]:
            yield from code_words(item, depth - 1)
    if isinstance(value, dict):
        yield from filter(None, (code_word(value.get(name)) for name in CODE_NAMES))
        for name in CODE_HOLDERS:
            if value.get(name):
                yield from code_words(value[name], depth - 1)


def code_word(value: Any) -> str:
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        return ""
    word = str(value)[:80] if isinstance(value, str) or -(10**9) < value < 10**9 else ""
    if not (word.isascii() and word.isdigit()):
        return word
    return "" if 400 <= int(word) <= 599 or int(word) == 0 else f"#{word}"


def embedded_error(value: Any) -> Outcome | None:
    """The error that a 200 body or a stream event holds, if it holds one."""
    value = value[0] if isinstance(value, list) and value else value
    if not isinstance(value, dict):
        return None
    error = value.get("error")
    if not error and value.get("type") != "error" and value.get("object") != "error":
        return silent_error(value)
    wait = value_wait(value)
    return Outcome(
        embedded_status(value),
        scrub(dig_message(value) or json.dumps(error)[:600]),
        retry_after=None if wait.after is None else wait.seconds(0.0),
        code=error_words(value),
        resets_at=wait.at,
    )


def silent_error(value: Json) -> Outcome | None:
    """An error that no member `error` tells: a blocked prompt (Gemini), success false
    (Cloudflare), base_resp (MiniMax)."""
    if value.get("choices"):
        return None
    block = value.get("promptFeedback")
    if isinstance(block, dict) and block.get("blockReason"):
        why = f"{block['blockReason']} {block.get('blockReasonMessage') or ''}"
        return Outcome(400, scrub(f"the prompt was blocked: {why}"), code="content_filter")
    told = value.get("base_resp")
    if value.get("success", True) and not (isinstance(told, dict) and told.get("status_code")):
        return None
    text = scrub(dig_message(value) or "failed")
    return Outcome(embedded_status(value), text, code=error_words(value))


def embedded_status(value: Json) -> int:
    """The HTTP status an error object stands for; 502 when it does not say."""
    places = [value]
    while isinstance(inner := places[0].get("error"), dict) and len(places) < 4:
        places.insert(0, inner)
    for place in places:
        for name in ("code", "status_code", "status", "http_status", "statusCode"):
            number = str(place.get(name, ""))[:4]
            if number.isascii() and number.isdigit() and 400 <= int(number) <= 599:
                return int(number)
    words = (place.get(name) for place in places for name in ("code", "type", "status"))
    named = (STATUS_WORDS.get(word.lower()) for word in words if isinstance(word, str))
    return next(filter(None, named), 502)


# --- how long it lasts ---

MAX_REST_S: Final = 86_400.0
MAX_DATED_S: Final = 31 * 86_400.0  # of a date; a later one is as absurd as a longer wait
UNITS: Final[Mapping[str, float]] = {
    "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0,
}  # fmt: skip
PIECE: Final = re.compile(
    r"\s?(?:,|and)?\s?(\d{1,12}(?:\.\d{1,20})?)\s?"
    r"(?:(ms)|millisecond(?:s)?()|([smhdw])|(s)ec(?:ond)?s?|(m)in(?:ute)?s?|(h)(?:ou)?rs?|(d)ays?"
    r"|(w)eeks?)(?![a-z])",
    re.IGNORECASE,
)
ISO_DATE: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:T|\s(?:at\s)?)(\d\d):(\d\d)(?::(\d\d)(?:\.\d{1,9})?)?"
    r"\s?(?:(Z|UTC|GMT)|([+-])(\d\d):?(\d\d))?",
    re.IGNORECASE,
)
HTTP_DATE: Final = re.compile(r"[A-Z][a-z]{2}, \d\d? [A-Z][a-z]{2} \d{4} [\d:]{8} (?:GMT|UTC)")
# Prose that a wait follows: "try again in 7m12s" (groq), "retry in 25.46s" (gemini), "retrying in
# 8h 13m" (opencode), "will reset at 2026-09-04 19:01:25" (zai), "regain access on" (anthropic).
TRIGGER: Final = re.compile(
    r"\b(?:try(?: your request)? again|retry(?:ing)?|resets?|replenish(?:es|ed)?|regain access|wait"
    r"|available(?: again)?)[\s:]{1,3}"
    r"(?:(?:in|after|at|on|for|until|about|approximately|another|again)[\s:]{1,2}){0,3}",
    re.IGNORECASE,
)
# Members of a JSON body, written without `_` and `-` in small letters.
WAIT_NAMES: Final = frozenset({
    "retrydelay", "retryafter", "retryafterseconds", "resetsinseconds", "resetinseconds",
    "resetafterseconds", "quotaresetdelay",
})  # fmt: skip
MOMENT_NAMES: Final = frozenset({
    "resetsat", "resetat", "resettime", "quotaresettimestamp", "nextflushtime", "xratelimitreset",
})  # fmt: skip
LOOSE_WAIT: Final = re.compile(
    r'"(?:retryDelay|retry_after|resets_in_seconds)"\s{0,4}:\s{0,4}"?(\d{1,12}(?:\.\d{1,20})?)s?'
)
MAX_WAIT_NODES: Final = 2000


class Wait(NamedTuple):
    """How long a limit lasts as it was stated: seconds from now, or a moment (unix seconds)."""

    after: float | None = None
    at: float | None = None

    def seconds(self, wall: float) -> float | None:
        """Whole seconds from `wall`, at least 1, or None; a day at most unless a date says so."""
        if self.at is not None:
            left = self.at - wall
            left = left if left <= MAX_DATED_S else MAX_REST_S
        elif self.after is not None:
            left = min(self.after, MAX_REST_S)
        else:
            return None
        return max(1.0, float(int(left)))


UNSTATED: Final = Wait()


def read_wait(text: str, zone_s: float = 0.0) -> Wait:
    """A Retry-After, a reset header, a duration or a date.

    Takes 30, 1.5, 6s, 2m59.5s, 350ms, "20 seconds", unix times in s or ms, the three HTTP dates
    and ISO 8601. A date without a zone is `zone_s` seconds ahead of UTC.
    """
    text = text.strip(" \t\"'")[:200]
    try:
        number = float(text)
    except ValueError:
        after = parse_duration(text)
        return Wait(after) if after is not None else Wait(at=parse_date(text, zone_s))
    if not math.isfinite(number):
        return UNSTATED
    if number > 1e9:
        return Wait(at=number / 1000 if number > 1e11 else number)
    return Wait(number)


def parse_wait(text: str, wall: float) -> float | None:
    """Seconds from `wall` as read_wait reads them, not limited; None when nothing usable."""
    wait = read_wait(text)
    return wait.after if wait.at is None else wait.at - wall


def parse_duration(text: str) -> float | None:
    """Seconds of "2m59.5s" or "8h 13m"; None if anything else stands in the text."""
    total, end = leading_duration(text)
    return total if end and end == len(text) else None


def leading_duration(text: str) -> tuple[float, int]:
    """(seconds, where they end) of the duration that `text` begins with; (0, 0) without one."""
    total, end = 0.0, 0
    while match := PIECE.match(text, end):
        unit = next(found for found in match.groups()[1:] if found is not None).lower() or "ms"
        total += float(match[1]) * UNITS[unit]
        end = match.end()
    return round(total, 9), end


def parse_date(text: str, zone_s: float = 0.0) -> float | None:
    """Unix seconds of an ISO 8601 or HTTP date (RFC 1123, RFC 850, asctime), or None."""
    try:
        if match := ISO_DATE.match(text):
            return iso_seconds(match, zone_s)
        date = parsedate_to_datetime(text)
        return date.timestamp() if date.tzinfo else date.replace(tzinfo=timezone.utc).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def iso_seconds(match: re.Match[str], zone_s: float) -> float:
    year, month, day, hour, minute, second = (int(part or 0) for part in match.groups()[:6])
    moment = datetime(year, month, day, hour, minute, min(second, 59), tzinfo=timezone.utc)
    utc, sign, hours, minutes = match.groups()[6:]
    if sign:
        zone_s = (int(hours) * 3600 + int(minutes) * 60) * (1 if sign == "+" else -1)
    return moment.timestamp() - (0.0 if utc else zone_s)


def stated_wait(
    headers: Mapping[str, str], body: bytes, wall: float, zone_s: float = 0.0
) -> float | None:
    """The wait a refusal states, in whole seconds from 1; None when it states none.

    Headers (names in small letters) come before the body: retry-after-ms, retry-after, then the
    resets of what is used up.
    """
    millis = read_wait(headers.get("retry-after-ms", "")).after
    if millis:
        return Wait(millis / 1000).seconds(wall)
    for wait in header_waits(headers, zone_s):
        if (seconds := wait.seconds(wall)) is not None:
            return seconds
    if (seconds := reset_wait(headers, wall)) is not None:
        return seconds
    return body_wait(body, zone_s).seconds(wall)


def header_waits(headers: Mapping[str, str], zone_s: float) -> Iterator[Wait]:
    value = headers.get("retry-after", "")
    yield read_wait(value, zone_s)
    yield read_wait(value.partition(",")[0], zone_s)  # sent twice, and joined on the way


def reset_wait(headers: Mapping[str, str], wall: float) -> float | None:
    """Rate-limit headers of every spelling: of what is used up, the last to come back.

    x-ratelimit-reset[-requests|-tokens...] (openai, groq, openrouter; groq's are durations),
    anthropic-ratelimit-*-reset (RFC 3339), ratelimit-reset, and `ratelimit: "api";r=0;t=295` of
    the IETF draft (huggingface).
    """
    waits = [ietf_wait(headers.get("ratelimit", ""))]
    for name, value in headers.items():
        if "reset" not in name or "ratelimit" not in name.replace("-", ""):
            continue
        left = headers.get(name.replace("reset", "remaining"), "0").strip()
        if left in ("0", "0.0") or left.startswith("-"):
            waits.append(read_wait(value).seconds(wall))
    return max((wait for wait in waits if wait is not None), default=None)


def ietf_wait(value: str) -> float | None:
    """`"api";r=0;t=295` (each quota an item), or `limit=9, remaining=0, reset=5` (older drafts)."""
    value = value[:1000]
    items = [dict(re.findall(r"\b([rt])=(\d{1,9})", item)) for item in value.split(",")]
    older = dict(re.findall(r"\b(remaining|reset)=(\d{1,9})", value))
    items.append({"r": older.get("remaining", ""), "t": older.get("reset", "")})
    waits = (Wait(float(i["t"])).seconds(0.0) for i in items if i.get("t") and spent(i.get("r")))
    return max(filter(None, waits), default=None)


def spent(left: str | None) -> bool:
    return bool(left) and int(left or "1") == 0


def body_wait(body: bytes, zone_s: float = 0.0) -> Wait:
    """`retryDelay: "17s"` (Gemini), resets_at (Codex), `try again in 7m12s` (Groq)."""
    value = error_value(body)
    if value is not None:
        return value_wait(value, zone_s)
    text = body[:8192].decode("utf-8", "replace")
    if match := LOOSE_WAIT.search(text):
        return Wait(float(match[1]))
    return prose_wait(text, zone_s)


def value_wait(value: Any, zone_s: float = 0.0) -> Wait:
    """A wait in the members of an error value, else in its message; a moment beats a number."""
    after: float | None = None
    for name, found in itertools.islice(members(value, 8), MAX_WAIT_NODES):
        word = name.replace("_", "").replace("-", "").lower()
        if word == "retryafterms":
            wait = read_wait(f"{found}ms")
        elif word in WAIT_NAMES or word in MOMENT_NAMES:
            wait = read_wait(str(found), zone_s)
        else:
            continue
        if wait.at is not None:
            return wait
        after = wait.after if after is None else after
    return prose_wait(dig_message(value), zone_s) if after is None else Wait(after)


def members(value: Any, depth: int) -> Iterator[tuple[str, str | int | float]]:
    """(name, text or number) of every member inside a JSON value, also of JSON in strings."""
    value = packed_json(value) if isinstance(value, str) else value
    if not depth or not isinstance(value, (dict, list)):
        return
    pairs = value.items() if isinstance(value, dict) else (("", item) for item in value[:50])
    for name, inner in pairs:
        if isinstance(inner, (str, int, float)) and not isinstance(inner, bool):
            yield name, inner if not isinstance(inner, str) else inner[:200]
        if isinstance(inner, (str, dict, list)):
            yield from members(inner, depth - 1)


def prose_wait(text: str, zone_s: float = 0.0) -> Wait:
    """A wait in a sentence."""
    text = text[:8192]
    for match in itertools.islice(TRIGGER.finditer(text), 50):
        after, end = leading_duration(text[match.end() : match.end() + 60])
        if end:
            return Wait(after)
        if date := ISO_DATE.match(text, match.end()) or HTTP_DATE.match(text, match.end()):
            return Wait(at=parse_date(date[0], zone_s))
    if "\u91cd\u7f6e" in text and (date := ISO_DATE.search(text)):  # zai: reset, in Chinese
        return Wait(at=parse_date(date[0], zone_s))
    return UNSTATED


# --- what is in an answer ---


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
ASCII_ESCAPE: Final = re.compile(rb"\\u00[2-7]")
SCALAR: Final = rb'(\s*:\s*)(?:"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null)'


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
    return match and body[: match.end(1)] + written + body[match.end() :]


@functools.lru_cache(maxsize=64)
def member_pattern(name: str) -> re.Pattern[bytes]:
    return re.compile(b'"%b"' % re.escape(name.encode()) + SCALAR)


OUTPUT_LIMITS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def output_edits(body: Json, reserve: int, ceiling: int) -> dict[str, object]:
    """A body's output limit raised by the reasoning reserve, then held under the ceiling."""
    edits: dict[str, object] = {}
    for name in OUTPUT_LIMITS:
        asked = body.get(name)
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
# 11. Accents
# =============================================================================

# Every OpenAI-compatible provider speaks Chat with an accent. A ChatReader takes all of them;
# what leaves it is canonical: one role, one id, whole names, one finish, one usage.

# Words for the end of an answer, as recorded or documented (2026-10), and what they mean here.
FINISH_WORDS: Final = (
    ("stop", "stop eos eos_token end_turn end_of_turn stop_sequence complete completed pause_turn"),
    ("length", "length max_tokens max_output_tokens max_length model_length"),
    ("length", "model_context_window_exceeded"),
    ("tool_calls", "tool_calls tool_call tool_use function_call unexpected_tool_call"),
    ("content_filter", "content_filter content_filtered safety recitation refusal blocklist spii"),
    ("content_filter", "prohibited_content image_safety model_armor sensitive error_toxic"),
    ("error", "error network_error insufficient_system_resource abort aborted"),
    ("error", "malformed_function_call"),
)
FINISH_MEANINGS: Final = MappingProxyType(
    {word: meaning for meaning, words in FINISH_WORDS for word in words.split()}
)
ENDINGS: Final = frozenset({"stop", "length", "tool_calls", "content_filter"})

# Readable reasoning in a message or delta, best known first; a provider that gives several
# gives the same text in each (openrouter: reasoning + reasoning_details, 2026-10).
READABLE_KEYS: Final = ("reasoning_content", "reasoning", "thinking")
THINK_TAGS: Final = ("<think>", "<thinking>", "<thought>")
THINK_TAG: Final = re.compile(r"</?th(?:ink(?:ing)?|ought)>\n?")
TAG_STARTS: Final = frozenset(
    whole[:end]
    for tag in THINK_TAGS
    for whole in (tag, "</" + tag[1:])
    for end in range(1, len(whole) + 1)
)
MAX_BLANKS: Final = 1000  # characters of white space that may stand before <think>
FUNCTION_CALL: Final = -1  # the key of the one call made in the old way

# Where a usage object states a count: the first that is not zero is taken.
PROMPT_COUNTS: Final = ("prompt_tokens", "input_tokens")
COMPLETION_COUNTS: Final = ("completion_tokens", "output_tokens")
CACHED_COUNTS: Final = (
    "prompt_tokens_details.cached_tokens",
    "prompt_cache_hit_tokens",  # deepseek
    "num_cached_tokens",  # mistral
    "cached_tokens",  # moonshot, a huggingface route
    "input_tokens_details.cached_tokens",
    "cache_read_input_tokens",
)
CACHE_WRITE_COUNTS: Final = (
    "prompt_tokens_details.cache_creation_tokens",
    "prompt_tokens_details.cache_write_tokens",  # openrouter
    "cache_creation_input_tokens",
)
REASONING_COUNTS: Final = (
    "completion_tokens_details.reasoning_tokens",
    "output_tokens_details.reasoning_tokens",
    "reasoning_tokens",
)

# A JSON string, or what may stand between strings by mistake.
SLIP: Final = re.compile(r'"(?:[^"\\]|\\.)*"?|,(?=\s*[}\]])|\b(?:True|False|None)\b', re.DOTALL)
PYTHON_WORDS: Final = MappingProxyType({"True": "true", "False": "false", "None": "null", ",": ""})
LENIENT: Final = json.JSONDecoder(
    strict=False, parse_constant=refuse_constant, parse_float=finite_float
)


class ThinkSplitter:
    """Parts text that comes in pieces into (thought, said).

    Thought is what stands in <think> or its like at the very beginning; a tag further on is
    text. Blank space around the thought is dropped. How the text is cut makes no difference.
    """

    def __init__(self) -> None:
        self.settled = False  # all that comes now is said
        self._held = ""
        self._close = ""  # the tag that ends the thought under way
        self._trim = False

    def feed(self, text: str) -> tuple[str, str]:
        if self.settled:
            return "", text
        text, self._held = self._held + text, ""
        if not self._trim and not self._close:
            return self._begin(text)
        return self._inside(text) if self._close else ("", self._after(text))

    def finish(self) -> tuple[str, str]:
        """What was held back; a thought that never ended is a thought."""
        held, self._held = self._held, ""
        return (held, "") if self._close else ("", held)

    def _begin(self, text: str) -> tuple[str, str]:
        bare = text.lstrip()
        few_blanks = len(text) - len(bare) <= MAX_BLANKS
        tag = next((tag for tag in THINK_TAGS if bare.startswith(tag)), "")
        if tag and few_blanks:
            self._close, self._trim = "</" + tag[1:], True
            return self._inside(bare[len(tag) :])
        if few_blanks and any(tag.startswith(bare) for tag in THINK_TAGS):
            self._held = text
            return "", ""
        self.settled = True
        return "", text

    def _inside(self, text: str) -> tuple[str, str]:
        thought, closed, said = text.partition(self._close)
        if not closed:
            start = text.rfind("<")
            if start >= 0 and self._close.startswith(text[start:]):
                thought, self._held = text[:start], text[start:]
        if self._trim:
            thought = thought.lstrip()
            self._trim = not thought
        if not closed:
            return thought, ""
        self._close, self._trim = "", True
        return thought, self._after(said)

    def _after(self, text: str) -> str:
        said = text.lstrip()
        self.settled = bool(said)
        return said


class TagStripper:
    """Drops think tags from reasoning that comes in pieces (groq compound, 2025-09)."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> str:
        if not self._held and "<" not in text:
            return text
        text = self._held + text
        start = text.rfind("<")
        cut = start if text[start:] in TAG_STARTS else len(text)
        self._held = text[cut:]
        return THINK_TAG.sub("", text[:cut])

    def finish(self) -> str:
        held, self._held = self._held, ""
        return THINK_TAG.sub("", held)


@dataclass(eq=False)
class ToolCall:
    """One tool call under way. Nothing of it is told before its name is known."""

    given: str = ""  # the provider's id for it
    name: str = ""
    custom: bool = False
    index: int = -1  # in the canonical answer; -1 = not told yet
    pieces: list[str] = field(default_factory=list)  # of its arguments
    size: int = 0  # characters in them
    extra: Json = field(default_factory=dict)

    def is_other(self, id: str, name: str, piece: str) -> bool:
        """Does a delta with the same index, or with none, begin another call?

        Some number all parallel calls 0 (gemini compat), so that the id or the name must tell.
        """
        if id and self.given and id != self.given:
            return bool(name)
        if not name or not self.name:
            return False
        if name != self.name:
            return True
        return bool(piece) and not (id and id == self.given) and self._is_whole()

    def _is_whole(self) -> bool:
        if not self.pieces or self.pieces[-1].rstrip()[-1:] != "}":
            return False
        return isinstance(json_or_none("".join(self.pieces)), dict)

    def add(self, piece: str, repeats: bool = False) -> str:
        """Keep a piece of the arguments; "" for one that `repeats` what is there as a whole."""
        if repeats and self._is_whole():
            return ""
        self.pieces.append(piece)
        self.size += len(piece)
        return piece

    def part(self, piece: str) -> Json:
        """The canonical delta of one more piece."""
        if self.custom:
            return {"index": self.index, "custom": {"input": piece}}
        return {"index": self.index, "function": {"arguments": piece}}


class CallReader:
    """The tool calls of one message: deltas of any shape in, canonical deltas out."""

    def __init__(self) -> None:
        self.told = 0  # calls that are in the canonical answer
        self._calls: list[ToolCall] = []
        self._by_key: dict[int, ToolCall] = {}
        self._by_id: dict[str, ToolCall] = {}
        self._ids: set[str] = set()
        self._signature = ""  # of the message, for its first call

    def feed(self, parts: list[Any]) -> list[Json]:
        out: list[Json] = []
        for at, part in enumerate(parts):
            if not isinstance(part, dict):
                continue
            index = count_of(part.get("index"))
            if index is None and len(parts) > 1 and not part.get("id"):
                index = at
            self._read(part, index, out)
        return out

    def feed_function(self, call: Json) -> list[Json]:
        """A delta of `function_call`, as it was before there were tools."""
        out: list[Json] = []
        if not self._calls or FUNCTION_CALL in self._by_key:
            self._read({"function": call}, FUNCTION_CALL, out)
        return out

    def sign(self, signature: str) -> list[Json]:
        """A signature that stands on the message belongs to its first call (gemini)."""
        if not self._calls:
            self._signature = signature
        elif not self._calls[0].extra:
            first = self._calls[0]
            first.extra = google_extra(signature)
            if first.index >= 0:
                return [{"index": first.index, "extra_content": first.extra}]
        return []

    def finish(self) -> list[Json]:
        """Calls that waited for an id, and "{}" for those that came without arguments."""
        out: list[Json] = []
        for call in self._calls:
            bare = not call.size and not call.custom
            if bare:
                call.add("{}")
            if call.index >= 0 and bare:
                out.append(call.part("{}"))
            elif delta := self._open(call, at_end=True):
                out.append(delta)
        return out

    def _read(self, part: Json, index: int | None, out: list[Json]) -> None:
        body, custom = call_body(part)
        id, name = id_text(part.get("id")), as_text(body.get("name"))
        raw = body.get("input" if custom else "arguments")
        piece, extra = arguments_text(raw), call_extra(part, body)
        if not (id or name or piece or extra):
            return
        call = self._call(index, id, name)
        if call is None or call.is_other(id, name, piece):
            call = self._begin(index, custom, out)
        call.given, call.name = call.given or id, call.name or name
        if call.given:
            self._by_id.setdefault(call.given, call)
        if piece:
            piece = call.add(piece, bool(name) or not isinstance(raw, str))
        self._tell(call, piece, extra, out)

    def _call(self, index: int | None, id: str, name: str) -> ToolCall | None:
        """The call that a delta goes on with, None if it must be a new one."""
        here = None if index is None else self._by_key.get(index)
        known = self._by_id.get(id) if id else None
        moved = known is not None and not name and here is not None and here.given not in ("", id)
        if here and not moved:
            return here
        if known and (index is None or not name):
            return known
        latest = self._calls[-1] if self._calls and index is None else None
        return None if latest is None or (id and latest.given) else latest

    def _begin(self, index: int | None, custom: bool, out: list[Json]) -> ToolCall:
        """A new call; earlier ones that only waited for an id are told first."""
        out += [delta for call in self._calls if (delta := self._open(call, at_end=True))]
        call = ToolCall(custom=custom)
        if not self._calls and self._signature:
            call.extra = google_extra(self._signature)
        self._calls.append(call)
        if index is not None:
            self._by_key[index] = call
        return call

    def _tell(self, call: ToolCall, piece: str, extra: Json, out: list[Json]) -> None:
        call.extra = extra or call.extra
        if call.index < 0:
            if delta := self._open(call):
                out.append(delta)
            return
        if piece:
            out.append(call.part(piece))
        if extra:
            out.append({"index": call.index, "extra_content": extra})

    def _open(self, call: ToolCall, at_end: bool = False) -> Json | None:
        """The first delta of a call, once its name is known and its id is, or will not come."""
        if call.index >= 0 or not call.name or not (call.given or call.size or at_end):
            return None
        id = call.given
        if not id or id in self._ids:
            id = new_call_id()
        self._ids.add(id)
        call.index, self.told = self.told, self.told + 1
        kind, member = ("custom", "input") if call.custom else ("function", "arguments")
        body = {"name": call.name, member: "".join(call.pieces)}
        delta: Json = {"index": call.index, "id": id, "type": kind, kind: body}
        return {**delta, "extra_content": call.extra} if call.extra else delta


class ChoiceReader:
    """One choice of an answer: provider deltas in, canonical deltas out."""

    def __init__(self, index: int, origin: str) -> None:
        self.index, self._origin = index, origin
        self.word = ""  # the provider's finish reason
        self.stop_sequence = ""
        self.annotations: list[Any] = []
        self.splitter = ThinkSplitter()
        self.spoke = False  # something of it was told
        self._calls = CallReader()
        self._tags = TagStripper()
        self._source = ""  # the member that readable reasoning is taken from
        self._by_delta = False

    def feed(self, choice: Json) -> Json:
        """The canonical delta for one choice object, {} when there is nothing to tell."""
        self._end(choice)
        delta = self._delta(choice)
        thought, said = self._content(delta)
        reasoning = self._reasoning(delta) + thought
        out: Json = {}
        if reasoning:
            out["reasoning_content"] = reasoning
        if details := reasoning_pieces(delta, self._origin):
            out["reasoning_details"] = details
        if said:
            out["content"] = said
        out |= self._others(delta)
        if calls := self._tool_calls(delta):
            out["tool_calls"] = calls
        return self._spoken(out)

    def finish(self) -> Json:
        """The rest of the choice, with its one finish reason."""
        thought, said = self.splitter.finish()
        reasoning, calls = self._tags.finish() + thought, self._calls.finish()
        out: Json = {"reasoning_content": reasoning} if reasoning else {}
        if said and (said.strip() or not self._calls.told):
            out["content"] = said
        if calls:
            out["tool_calls"] = calls
        delta, finish = self._spoken(out), self.finish_reason()
        end: Json = {"index": self.index, "delta": delta, "finish_reason": finish}
        if self.stop_sequence and finish == "stop":
            end["stop_sequence"] = self.stop_sequence
        return end

    def finish_reason(self) -> str:
        """The canonical finish reason: calls that were made count for more than the word."""
        meaning = FINISH_MEANINGS.get(self.word.lower(), "stop")
        if meaning in ("stop", "tool_calls"):
            return "tool_calls" if self._calls.told else "stop"
        return meaning

    def _end(self, choice: Json) -> None:
        self.word = self.word or as_text(choice.get("finish_reason"))
        for name in ("stop_sequence", "stop_reason", "matched_stop"):  # anthropic, vllm, sglang
            word = as_text(choice.get(name))
            if word and word.lower() not in FINISH_MEANINGS:
                self.stop_sequence = word

    def _delta(self, choice: Json) -> Json:
        """The part of a choice to read: a `message` beside deltas only repeats them."""
        delta, message = choice.get("delta"), choice.get("message")
        if isinstance(delta, dict) and (has_content(delta) or self.spoke):
            self._by_delta = True
            return delta
        if isinstance(message, dict) and not self._by_delta:
            return message
        if isinstance(delta, dict):
            return delta
        return {"content": choice.get("text")}

    def _content(self, delta: Json) -> tuple[str, str]:
        """(thought, said) of the content, which may be a list of typed parts (mistral)."""
        content = delta.get("content")
        if isinstance(content, str):
            return self.splitter.feed(content) if content else ("", "")
        thoughts, texts = "", ""
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") == "thinking":
                thoughts += thinking_text(part.get("thinking"))
                continue
            text = part.get("text") if isinstance(part, dict) else part
            thought, said = self.splitter.feed(as_text(text))
            thoughts, texts = thoughts + thought, texts + said
        return thoughts, texts

    def _reasoning(self, delta: Json) -> str:
        """Readable reasoning, taken from one member only so that repeats are not counted."""
        if not self._source:
            plain = (name for name in READABLE_KEYS if as_text(delta.get(name)))
            self._source = next(plain, "reasoning_details" if details_text(delta) else "")
        if not self._source:
            return ""
        if self._source == "reasoning_details":
            return details_text(delta)
        text = as_text(delta.get(self._source))
        return self._tags.feed(text) if text else ""

    def _others(self, delta: Json) -> Json:
        """Refusal, audio and annotations, without the empty ones (snowflake sends all)."""
        out: Json = {}
        if refusal := as_text(delta.get("refusal")):
            out["refusal"] = refusal
        audio = delta.get("audio")
        if isinstance(audio, dict) and any(audio.values()):
            out["audio"] = {name: value for name, value in audio.items() if value}
        notes = delta.get("annotations")
        notes = [n for n in notes if isinstance(n, dict)] if isinstance(notes, list) else []
        if fresh := [note for note in notes if note not in self.annotations]:
            self.annotations += fresh
            out["annotations"] = fresh
        return out

    def _tool_calls(self, delta: Json) -> list[Json]:
        parts, function = delta.get("tool_calls"), delta.get("function_call")
        out: list[Json] = []
        if parts:
            out = self._calls.feed(parts if isinstance(parts, list) else [parts])
        elif function and isinstance(function, dict):
            out = self._calls.feed_function(function)
        if signature := message_signature(delta):
            out += self._calls.sign(signature)
        return out

    def _spoken(self, out: Json) -> Json:
        if not out or self.spoke:
            return out
        self.spoke = True
        return {"role": "assistant", **out}


class ChatReader:
    """A Chat provider's stream in any accent -> canonical chunks.

    feed() gives what can be told at once; finish() the rest, then one finish reason for each
    choice and one usage chunk, for a stream that ended well. After an error nothing more comes.
    """

    def __init__(self, origin: str) -> None:
        self.finished = False  # a finish reason was seen
        self._origin = origin
        self._head: Json = {}
        self._choices: dict[int, ChoiceReader] = {}
        self._plain: dict[Any, ChoiceReader] = {}  # choices of which only text needs no look
        self._usage: Json | None = None
        self._sources: list[Json] = []
        self._over = False

    def feed(self, event: Json) -> list[Json]:
        try:
            (choice,) = event["choices"]
            delta = choice["delta"]
            content, reader = delta["content"], self._plain[choice["index"]]
        except (KeyError, TypeError, ValueError):
            return self._read(event)
        # Nearly all events of a stream are a piece of text and nothing else.
        if (
            content.__class__ is not str
            or not content
            or len(delta) > 1 + ("role" in delta)
            or choice.get("finish_reason") is not None
            or event.get("usage")
            or "error" in event
            or "x_groq" in event
            or self._over
        ):
            return self._read(event)
        told = {"index": reader.index, "delta": {"content": content}, "finish_reason": None}
        return [{**self._head, "choices": [told]}]

    def finish(self) -> list[Json]:
        """What is left of a stream that ended well: held text, finish reasons, usage."""
        if self._over:
            return []
        self._over = True
        ends = [reader.finish() for _, reader in sorted(self._choices.items())]
        if ends and self._sources and not self._choices[ends[0]["index"]].annotations:
            ends[0]["delta"]["annotations"] = self._sources
        out = [self._chunk(ends)] if ends else []
        return [*out, {**self._chunk([]), "usage": self._usage}] if self._usage else out

    def _read(self, event: Any) -> list[Json]:
        if self._over or not event:
            return []
        if error := error_chunk(event):
            self._over = True
            return [error]
        if not isinstance(event, dict):
            return []
        self._note(event)
        told = []
        choices = event.get("choices")
        for at, choice in enumerate(choices if isinstance(choices, list) else ()):
            if isinstance(choice, dict) and (one := self._read_choice(choice, at)):
                told.append(one)
        out = [self._chunk(told)] if told else []
        for reader in self._choices.values():
            if reader.finish_reason() == "error":
                self._over = True
                return [*out, finish_error(reader.word)]
        return out

    def _read_choice(self, choice: Json, at: int) -> Json | None:
        index = count_of(choice.get("index"))
        index = at if index is None else index
        reader = self._choices.get(index)
        if reader is None:
            reader = self._choices[index] = ChoiceReader(index, self._origin)
        delta = reader.feed(choice)
        self.finished = self.finished or bool(reader.word)
        if reader.spoke and reader.splitter.settled:
            self._plain[index] = reader
        return {"index": index, "delta": delta, "finish_reason": None} if delta else None

    def _note(self, event: Json) -> None:
        """Keep what stands beside the choices: the head, usage, sources."""
        if not self._head:
            self._head = chunk_head(event)
        usage = canonical_usage(event)
        if usage and (self._usage is None or any(counts_of(usage))):
            self._usage = usage
        if not self._sources and (event.get("citations") or event.get("search_results")):
            self._sources = source_notes(event)

    def _chunk(self, choices: list[Json]) -> Json:
        return {**self._head, "choices": choices}


def canonical_reply(reply: Json, origin: str) -> Json:
    """A whole Chat reply in any accent -> the canonical one; {"error": ...} if it is an error.

    The same as reading the stream of the same answer, since it is read as a stream of one event.
    """
    reader = ChatReader(origin)
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if isinstance(choices, list):
        reply = {**reply, "choices": [whole_choice(choice) for choice in choices]}
    return gathered_reply([*reader.feed(reply), *reader.finish()])


def whole_choice(choice: Any) -> Any:
    """A choice of a whole reply without the delta that may stand beside its message."""
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        return choice
    return {name: value for name, value in choice.items() if name != "delta"}


def gathered_reply(chunks: Iterable[Json]) -> Json:
    """Canonical chunks put together into the canonical whole reply, or {"error": ...}."""
    head: Json = {"id": "", "object": "chat.completion", "created": 0, "model": ""}
    choices: dict[int, Gathered] = {}
    usage = None
    for chunk in chunks:
        if "error" in chunk:
            return {"error": chunk["error"]}
        head |= {name: chunk[name] for name in ("id", "created", "model") if chunk.get(name)}
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            choices.setdefault(choice["index"], Gathered()).add(choice)
    reply = {**head, "choices": [one.choice(at) for at, one in sorted(choices.items())]}
    return {**reply, "usage": usage} if usage else reply


class Gathered:
    """One choice of canonical chunks on its way to a whole message."""

    def __init__(self) -> None:
        self._texts: dict[str, list[str]] = {}
        self._lists: dict[str, list[Json]] = {}
        self._audio: Json = {}
        self._calls: dict[int, Json] = {}
        self._end: Json = {}

    def add(self, choice: Json) -> None:
        delta = choice["delta"]
        for name in ("content", "reasoning_content", "refusal"):
            if delta.get(name):
                self._texts.setdefault(name, []).append(delta[name])
        for piece in delta.get("reasoning_details") or ():
            add_piece(self._lists.setdefault("reasoning_details", []), piece)
        if notes := delta.get("annotations"):
            self._lists.setdefault("annotations", []).extend(notes)
        for call in delta.get("tool_calls") or ():
            grow_call(self._calls.setdefault(call["index"], {}), call)
        if audio := delta.get("audio"):
            self._audio = merged_audio(self._audio, audio)
        for name in ("finish_reason", "stop_sequence"):
            if choice.get(name):
                self._end[name] = choice[name]

    def choice(self, index: int) -> Json:
        texts = {name: "".join(pieces) for name, pieces in self._texts.items()}
        message: Json = {"role": "assistant", "content": texts.pop("content", None)}
        message |= {**texts, **self._lists}
        if self._audio:
            message["audio"] = self._audio
        if self._calls:
            message["tool_calls"] = [call for _, call in sorted(self._calls.items())]
        if message["content"] is None and not has_content({**message, **NO_REASONING}):
            message["content"] = ""
        finish = self._end.get("finish_reason", "stop")
        return {"index": index, "message": message, **self._end, "finish_reason": finish}


NO_REASONING: Final = MappingProxyType({"reasoning_content": "", "reasoning_details": ()})


def add_piece(pieces: list[Json], piece: Json) -> None:
    """Join a piece of reasoning to the last one if it goes on with it, else append it."""
    kind, last = piece.get("type"), pieces[-1] if pieces else {}
    member = {"reasoning.text": "text", "reasoning.summary": "summary"}.get(str(kind))
    goes_on = (
        member is not None
        and last.get("type") == kind
        and last.get("index") == piece.get("index")
        and not (last.get("signature") and piece.get(member))
        and last.get("id") in (None, piece.get("id", last.get("id")))
    )
    if not goes_on or member is None:
        pieces.append(dict(piece))
        return
    joined = as_text(last.get(member)) + as_text(piece.get(member))
    pieces[-1] = {**last, **{k: v for k, v in piece.items() if v is not None}, member: joined}


def grow_call(call: Json, delta: Json) -> None:
    """Add one canonical tool call delta to the whole call."""
    rest = ("id", "type", "extra_content")
    call |= {name: delta[name] for name in rest if delta.get(name)}
    for kind, member in (("function", "arguments"), ("custom", "input")):
        body = delta.get(kind)
        if isinstance(body, dict):
            old = call.get(kind, {})
            call[kind] = {**old, **body, member: old.get(member, "") + body.get(member, "")}


def merged_audio(old: Json, new: Json) -> Json:
    joined = {n: as_text(old.get(n)) + as_text(new.get(n)) for n in ("data", "transcript")}
    return {**old, **new, **{name: text for name, text in joined.items() if text}}


# --- pieces of an accent ---


def chunk_head(event: Json) -> Json:
    """The members that every canonical chunk of an answer begins with: its first ones."""
    created = count_of(event.get("created"))
    return {
        "id": as_text(event.get("id")) or f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion.chunk",
        "created": created or 0,
        "model": as_text(event.get("model")),
    }


def finish_error(word: str) -> Json:
    """The canonical error for a finish reason that stands for one (openrouter, zai, deepseek)."""
    message = f"the provider ended its answer with finish_reason {word}"
    return {"error": {"message": message, "type": "upstream_error", "code": "finish_error"}}


def error_chunk(event: Any) -> Json | None:
    """The canonical error for an event that holds one."""
    found = embedded_error(event)
    if not found:
        return None
    holder = event[0] if isinstance(event, list) else event
    error = holder.get("error")
    error = error if isinstance(error, dict) else {}
    code = error.get("code") or found.status
    kind = as_text(error.get("type")) or "upstream_error"
    return {"error": {"message": found.text, "type": kind, "code": id_text(code) or None}}


def as_text(value: object) -> str:
    return value if isinstance(value, str) else ""


def id_text(value: object) -> str:
    """An id or a code as text; some are numbers."""
    return str(value) if type(value) is int and abs(value) < 10**30 else as_text(value)


def count_of(value: object) -> int | None:
    """A count or an index that may have come as a float or as text; None if it is none."""
    if type(value) is int:
        return value if value >= 0 else None
    if isinstance(value, str) and len(value) > 20 or isinstance(value, bool):
        return None
    if not isinstance(value, (str, float)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if 0 <= number < 1e18 else None


def json_or_none(text: str) -> Any:
    """The JSON value of a text, None for one that strict readers would refuse."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError):
        return None


def json_text(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        return ""


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def call_body(part: Json) -> tuple[Json, bool]:
    """(the object with the name, is it a custom tool's) of a tool call of any shape."""
    function, custom = part.get("function"), part.get("custom")
    if isinstance(function, dict) and any(function.values()):
        return function, False
    if isinstance(custom, dict) and any(custom.values()):
        return custom, True
    if isinstance(function, dict) or isinstance(custom, dict):
        return {}, part.get("type") == "custom"
    return part, False


def arguments_text(value: object) -> str:
    """Arguments as JSON text; "" for none, and for an empty object, which says no more."""
    if isinstance(value, str):
        return value
    return json_text(value) if value and isinstance(value, (dict, list)) else ""


def google_extra(signature: str) -> Json:
    return {"google": {"thought_signature": signature}}


def call_extra(part: Json, body: Json) -> Json:
    """What must go back with a call: extra_content, or a bare thought_signature."""
    extra = part.get("extra_content") or body.get("extra_content")
    if extra and isinstance(extra, dict):
        return extra
    signature = as_text(part.get("thought_signature")) or as_text(body.get("thought_signature"))
    return google_extra(signature) if signature else {}


def message_signature(delta: Json) -> str:
    """Gemini's thought signature on a message (OpenAI surface, 2025-06)."""
    if signature := as_text(delta.get("thought_signature")):
        return signature
    extra = delta.get("extra_content")
    google = extra.get("google") if isinstance(extra, dict) else None
    return as_text(google.get("thought_signature")) if isinstance(google, dict) else ""


def thinking_text(value: object) -> str:
    """The text of a `thinking` part: a string (cohere) or a list of text parts (mistral)."""
    if not isinstance(value, list):
        return as_text(value)
    texts = (item.get("text") if isinstance(item, dict) else item for item in value)
    return "".join(map(as_text, texts))


def details_of(delta: Json) -> list[Json]:
    details = delta.get("reasoning_details")
    return [d for d in details if isinstance(d, dict)] if isinstance(details, list) else []


def details_text(delta: Json) -> str:
    """The readable part of reasoning_details."""
    found = details_of(delta)
    return "".join(as_text(piece.get("text")) or as_text(piece.get("summary")) for piece in found)


def reasoning_pieces(delta: Json, origin: str) -> list[Json]:
    """reasoning_details as they came, marked with the provider they must go back to."""
    return [{**piece, "origin": origin} for piece in details_of(delta) if piece]


def source_notes(event: Json) -> list[Json]:
    """Perplexity's `search_results` or `citations` beside the choices, as annotations."""
    found = event.get("search_results") or event.get("citations")
    notes = []
    for source in found if isinstance(found, list) else ():
        source = source if isinstance(source, dict) else {"url": source}
        if url := as_text(source.get("url")):
            place = {"url": url, "title": as_text(source.get("title"))}
            note = {"start_index": 0, "end_index": 0, **place}
            notes.append({"type": "url_citation", "url_citation": note})
    return notes


# --- usage ---


def canonical_usage(value: Any) -> Json | None:
    """The usage in a Chat reply or chunk, wherever it stands; None if there is none.

    A total that was given is kept: xai's and gemini's are not the sum (recorded 2025-09).
    """
    usage = find_usage(value)
    if usage is None:
        return None
    prompt, completion = first_count(usage, PROMPT_COUNTS), first_count(usage, COMPLETION_COUNTS)
    total = first_count(usage, ("total_tokens",))
    if prompt is None and completion is None and total is None:
        return None
    prompt, completion = prompt or 0, completion or 0
    found: Json = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": total or prompt + completion,
        "prompt_tokens_details": {"cached_tokens": first_count(usage, CACHED_COUNTS) or 0},
        "completion_tokens_details": {
            "reasoning_tokens": first_count(usage, REASONING_COUNTS) or 0
        },
    }
    if written := first_count(usage, CACHE_WRITE_COUNTS):
        found["prompt_tokens_details"]["cache_creation_tokens"] = written
    return {**found, "estimated": True} if usage.get("estimated") is True else found


def find_usage(value: Any) -> Json | None:
    """The usage object of a reply or chunk: its own, groq's, or that of a choice (moonshot)."""
    if not isinstance(value, dict):
        return None
    choices = value.get("choices")
    inner = choices if isinstance(choices, list) else []
    for place in (value, value.get("x_groq"), *inner):
        usage = place.get("usage") if isinstance(place, dict) else None
        if usage and isinstance(usage, dict):
            return usage
    return None


def first_count(usage: Json, paths: Iterable[str]) -> int | None:
    """The first count that is not zero; 0 if there are only zeros, None if there are none."""
    found = None
    for path in paths:
        outer, _, inner = path.partition(".")
        value = usage.get(outer)
        if inner:
            value = value.get(inner) if isinstance(value, dict) else None
        count = count_of(value)
        if count:
            return count
        found = count if found is None else found
    return found


def counts_of(usage: Json) -> tuple[int, int, int]:
    return usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]


def estimate_usage(input_tokens: int, chars_out: int) -> Json:
    """A usage for an answer that came without one; `chars_out` counts text and arguments."""
    completion = math.ceil(chars_out / BYTES_PER_TOKEN)
    return {
        "prompt_tokens": input_tokens,
        "completion_tokens": completion,
        "total_tokens": input_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
        "estimated": True,
    }


# --- tool arguments ---


def repaired_arguments(text: str) -> str | None:
    """Tool arguments as the JSON text of an object, mended where that is safe; else None.

    Mended: nothing at all, code fences, an object written as a string, junk behind it,
    commas before a bracket, Python's True, False and None, bare line breaks in strings.
    What was cut off stays broken: half a command must not be run.
    """
    text = text.strip()
    if isinstance(json_or_none(text), dict):
        return text
    if text in ("", "null", "None"):
        return "{}"
    if text.startswith("```"):
        text = text[text.find("{") :]
    value = lenient_value(text)
    if value is None:
        value = lenient_value(SLIP.sub(mend_slip, text))
    if isinstance(value, str):  # an object in a string: once more, and that is all
        value = lenient_value(value)
    return json_text(value) or None if isinstance(value, dict) else None


def lenient_value(text: str) -> Any:
    """The JSON object or string that a text begins with, None if it begins with neither."""
    text = text.strip()
    if text[:1] not in ("{", '"'):
        return None
    try:
        value, end = LENIENT.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    rest = text[end:].lstrip()
    # An empty object in front of the real one is a placeholder that was sent with the name.
    return lenient_value(rest) if value == {} and rest.startswith("{") else value


def mend_slip(found: re.Match[str]) -> str:
    return PYTHON_WORDS.get(found[0], found[0])


# --- must it be read at all? ---


def needs_reading(first_event: Json) -> bool:
    """Must a Chat client get canonical chunks, because the provider's own would confuse it?

    Asked about the first useful event of a stream, or about a whole reply.
    """
    choices = first_event.get("choices") if isinstance(first_event, dict) else None
    if not isinstance(choices, list):
        return False
    whole = first_event.get("object") == "chat.completion"
    return any(isinstance(choice, dict) and is_odd_choice(choice, whole) for choice in choices)


def is_odd_choice(choice: Json, whole: bool) -> bool:
    finish, message = choice.get("finish_reason"), choice.get("message" if whole else "delta")
    if not isinstance(message, dict) or (finish is not None and id_text(finish) not in ENDINGS):
        return True
    calls, function = message.get("tool_calls"), message.get("function_call")
    if isinstance(function, dict) and any(function.values()):
        return True
    if calls and (not isinstance(calls, list) or finish == "stop"):
        return True
    return is_odd_content(message.get("content")) or any(
        is_odd_call(call, whole) for call in calls or ()
    )


def is_odd_content(content: object) -> bool:
    """Is it a list, or may it be the beginning of <think>?"""
    if not isinstance(content, str):
        return content is not None
    if not content or content[0] not in "< \t\r\n":
        return False
    start = content.lstrip()[:10]
    return any(start.startswith(tag) or tag.startswith(start) for tag in THINK_TAGS)


def is_odd_call(call: Any, whole: bool) -> bool:
    if not isinstance(call, dict) or not call.get("id") or not call.get("type"):
        return True
    if call["type"] == "custom":
        return False
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, dict) else None
    return not isinstance(arguments, str) or (not whole and "index" not in call)


# =============================================================================
# 12. Quirks
# =============================================================================


@dataclass(frozen=True)
class Quirk:
    """What one provider asks of a chat body, for all its models or for a family of them.

    Rows that match are laid over one another in the order of QUIRKS: tuples of names add up,
    every other field is taken from the last row that says something (None says nothing).
    """

    provider: str  # a row of PROVIDERS; "*" = any
    family: str  # regular expression found in the lower-case model id; "" = any
    seen: str  # when this was last known to be so
    # Members of the body
    drop: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()  # wins over `drop` and adds to `allow`
    allow: tuple[str, ...] | None = None  # strict providers: everything else goes
    rename: tuple[tuple[str, str], ...] = ()
    limits: tuple[tuple[str, float, float], ...] = ()  # (member, lowest, highest)
    extra: tuple[tuple[str, str], ...] = ()  # (member, JSON) set when the client says nothing
    max_tokens: str | None = None  # its only name of the two; "" = both are fine
    default_max_tokens: int | None = None  # sent when the client names no limit
    unstreamed_max_tokens: int | None = None  # more than this is only taken with stream
    max_stop: int | None = None
    metadata_needs_store: bool | None = None
    # Messages
    message_drop: tuple[str, ...] = ()
    message_keep: tuple[str, ...] = ()
    cache_control: bool | None = None  # may stand on parts and tools
    system_role: str | None = None  # the name that must be used; "" = either
    lead_system: bool | None = None  # only one system message, and in front
    alternate: bool | None = None  # user and assistant must take turns
    tool_order: bool | None = None  # Mistral: after a result comes the assistant
    prefix: bool | None = None  # Mistral: a last assistant message must say "prefix": true
    tool_ids: str | None = None  # "mistral9" = exactly nine letters and digits
    flat: str | None = None  # lists of only text become a string: "", "tool" or "all"
    no_null: bool | None = None  # content null becomes ""
    no_empty: bool | None = None  # an assistant message must say something
    single_call: bool | None = None  # one tool call in a message
    images_in_results: bool | None = None  # else they move to a user message behind the results
    files: tuple[str, ...] | None = None  # forms of file parts it reads: data, id, url
    audio: bool | None = None
    # Tools and formats
    choices: tuple[str, ...] | None = None  # of auto, none, required, named
    choosing_stops_thinking: bool | None = None  # a forced tool is refused while it thinks
    own_tools: bool | None = None  # takes tools that are neither function nor custom
    custom_tools: bool | None = None
    functions: bool | None = None  # takes the older `functions` and `function_call`
    tool_description: bool | None = None  # every tool needs one
    strict_tools: bool | None = None  # False: `strict` is refused
    json_with_tools: bool | None = None  # False: an answer format beside tools is refused
    json_schema: bool | None = None  # False: only json_object
    schema: str | None = None  # name of a row in SCHEMAS
    # Reasoning
    reasoning_replay: str | None = None  # reject, accept or require (on turns with tool calls)
    reasoning_field: str | None = None  # reasoning_content or reasoning_details
    placeholder: str | None = None  # stands for missing reasoning; "" = thinking is turned off
    thought_signatures: bool | None = None  # Gemini: signed tool calls
    thinking: str | None = None  # "" not known, "toggle" {type: enabled|disabled}, "on" never off
    efforts: tuple[str, ...] | None = None  # words of reasoning_effort it knows
    infers_effort: bool | None = None  # sure to know it: `thinking` may become reasoning_effort
    prefill: bool | None = None  # goes on with a last message of the assistant
    native: bool | None = None  # not a Chat dialect: only the history is repaired


SAMPLING = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
LOGPROBS = ("logprobs", "top_logprobs", "logit_bias")
OPEN_SAMPLING = ("top_k", "min_p", "top_a", "repetition_penalty")  # of open models' servers
OPENAI_ONLY = (
    "store", "metadata", "service_tier", "prediction", "audio", "modalities", "verbosity",
    "web_search_options", "safety_identifier", "prompt_cache_retention", "prompt_cache_options",
)  # fmt: skip
COMMON = (
    "model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens", "stop",
    "tools", "tool_choice", "response_format", "n",
)  # fmt: skip
HUB_ONLY = (
    "is_error", "reasoning", "reasoning_content", "reasoning_details", "think", "thinking",
    "cache_control", "annotations", "refusal", "audio", "extra_content", "thought_signature",
    "function_call", "phase",
)  # fmt: skip
OPENAI_REASONING = r"^(?:openai/)?(?:o\d|gpt-(?:[5-9]|\d\d)(?!.*-chat))"
MISTRAL_FAMILY = r"mi[sx]tral|codestral|devstral|magistral|pixtral|voxtral"
GEMINI_SIGNED = r"gemini-(?![12])"

QUIRKS = (
    # What most servers of open models agree on.
    Quirk(
        "*", "", "2026-11",
        drop=(*OPENAI_ONLY, *OPEN_SAMPLING, "think", "thinking", "reasoning"),
        limits=(
            ("temperature", 0, 2), ("top_p", 0, 1),
            ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2),
        ),
        max_tokens="max_tokens", max_stop=4,
        message_drop=HUB_ONLY, system_role="system", lead_system=True, flat="tool",
        reasoning_replay="reject",
    ),
    # vLLM's and llama.cpp's templates for Mistral's models check order and ids as Mistral does.
    Quirk("*", MISTRAL_FAMILY, "2026-10", tool_order=True, tool_ids="mistral9", no_empty=True),
    Quirk(
        "gemini", "", "2026-11",  # an unknown member anywhere is fatal
        allow=(*COMMON, "max_completion_tokens", "extra_body"),
        max_tokens="", max_stop=5,
        message_drop=("name",), flat="all", schema="gemini", strict_tools=False,
        json_with_tools=False, files=("data",), audio=True,
        keep=("reasoning_effort",), efforts=("minimal", "low", "medium", "high"),
        infers_effort=True,
    ),
    Quirk("gemini", r"gemini-2", "2026-11", efforts=("none", "low", "medium", "high")),
    Quirk("gemini", r"gemma", "2026-11", efforts=()),
    Quirk("gemini", GEMINI_SIGNED, "2026-11", thought_signatures=True),
    Quirk(
        "openrouter", "", "2026-11", prefill=True, keep=(*OPENAI_ONLY, *OPEN_SAMPLING, "reasoning"),
        max_tokens="", system_role="", lead_system=False, flat="", cache_control=True,
        own_tools=True, files=("data", "url"), audio=True,
        reasoning_replay="accept", reasoning_field="reasoning_details",
        efforts=("none", "minimal", "low", "medium", "high", "xhigh"), infers_effort=True,
    ),
    Quirk(
        "kilo", "", "2026-10", keep=(*OPEN_SAMPLING, "reasoning"),
        max_tokens="", lead_system=False, cache_control=True, own_tools=True,
        files=("data",), reasoning_replay="accept", reasoning_field="reasoning_details",
    ),
    Quirk("requesty", "", "2026-10", max_tokens="", cache_control=True, files=("data",)),
    Quirk("vercel_ai_gateway", "", "2026-08", max_tokens="", cache_control=True, files=("data",)),
    Quirk("sambanova", "", "2026-08", efforts=(), drop=LOGPROBS),
    Quirk("sambanova", r"gpt-oss", "2026-08", efforts=("low", "medium", "high"),
          infers_effort=True),
    Quirk("github_models", "", "2026-07", max_tokens="", lead_system=False),
    Quirk(
        "cerebras", "", "2026-09",
        allow=(
            *COMMON, "max_completion_tokens", "seed", "user", "logprobs", "top_logprobs",
            "clear_thinking", "disable_reasoning", "reasoning_format",
        ),
        max_tokens="max_completion_tokens", limits=(("temperature", 0, 1.5),),
        message_drop=("name",), flat="all", choices=("auto", "none"), schema="cerebras",
        strict_tools=False, json_with_tools=False, efforts=(),
    ),
    Quirk("cerebras", r"gpt-oss", "2026-09", keep=("reasoning_effort",),
          efforts=("low", "medium", "high"), infers_effort=True),
    Quirk("cerebras", r"qwen", "2026-09", strict_tools=True),
    Quirk(
        "groq", "", "2026-09", prefill=True, drop=LOGPROBS, keep=("service_tier",),
        message_drop=("name",),
        max_tokens="", flat="all", own_tools=True,
        json_with_tools=False, efforts=(),
    ),
    Quirk("groq", r"gpt-oss", "2026-11", keep=("reasoning_effort",),
          efforts=("low", "medium", "high"), infers_effort=True),
    Quirk("groq", r"qwen", "2026-11", keep=("reasoning_effort",), efforts=("none", "default"),
          infers_effort=True),
    Quirk(
        "mistral", "", "2026-11",  # 422 names every unknown key
        allow=(
            *COMMON, "random_seed", "presence_penalty", "frequency_penalty",
            "parallel_tool_calls", "prediction", "prompt_mode", "safe_prompt", "prompt_cache_key",
            "guardrails",
        ),
        rename=(("seed", "random_seed"),), limits=(("temperature", 0, 1.5),),
        message_drop=("name",), message_keep=("prefix",), lead_system=False, flat="all",
        tool_order=True, tool_ids="mistral9", prefix=True, prefill=True, no_empty=True,
        efforts=(),
    ),
    Quirk("mistral", r"mistral-(?:small|medium)", "2026-11", keep=("reasoning_effort",),
          efforts=("none", "high"), infers_effort=True),
    Quirk("mistral", r"mistral-large-4", "2026-11", keep=("reasoning_effort",), efforts=("high",)),
    Quirk(
        "cohere", "", "2026-10",
        drop=(*LOGPROBS, "n", "parallel_tool_calls", "user"),
        limits=(("temperature", 0, 1), ("top_p", 0.01, 0.99), ("presence_penalty", 0, 1),
                ("frequency_penalty", 0, 1)),
        max_stop=5, message_drop=("name",), choices=("none", "required"), schema="cohere",
        strict_tools=False, json_with_tools=False, no_empty=True, efforts=(),
    ),
    Quirk(
        "zai", "", "2026-11", keep=("thinking", "tool_stream", "do_sample"),
        limits=(("temperature", 0, 1), ("top_p", 0.01, 1)), max_stop=1,
        drop=("presence_penalty", "frequency_penalty", *LOGPROBS),
        lead_system=False, choices=("auto",), own_tools=True, json_schema=False,
        reasoning_replay="accept", reasoning_field="reasoning_content",
        thinking="toggle", efforts=(),
    ),
    # "thinking": {"type": "disabled"} is error 1210 (hermes-agent#85890)
    Quirk("zai", r"glm-5\.[2-9]", "2026-11", thinking="on", efforts=("low", "high", "max"),
          infers_effort=True),
    Quirk(
        "nvidia", "", "2026-11",  # "Unsupported parameter(s)"; stream_options hangs (DeepTutor#420)
        allow=(
            *(name for name in COMMON if name != "stream_options"), "seed", "presence_penalty",
            "frequency_penalty", "parallel_tool_calls", "chat_template_kwargs", "nvext",
        ),
        message_drop=("name",), flat="all", no_null=True, single_call=True, tool_description=True,
        strict_tools=False, efforts=(),
    ),
    Quirk("nvidia", r"gpt-oss", "2026-11", keep=("reasoning_effort",),
          efforts=("low", "medium", "high"), infers_effort=True),
    Quirk(
        "kimi", "", "2026-11",
        # k2.5 and later fix both values (nanobot#4967)
        drop=(*SAMPLING, *LOGPROBS), keep=("thinking",), max_tokens="max_tokens",
        message_keep=("partial",), lead_system=False, own_tools=True,
        choosing_stops_thinking=True,
        reasoning_replay="require", reasoning_field="reasoning_content", placeholder=" ",
        thinking="toggle", efforts=(),  # both at once are refused (nanobot#3939)
    ),
    Quirk("kimi", r"moonshot-v1|kimi-k2-0|kimi-latest", "2026-11",
          keep=("temperature", "top_p"), limits=(("temperature", 0, 1),)),
    # Two steps on the way to DeepSeek's and Moonshot's own servers, which look for the reasoning.
    Quirk("opencode", r"deepseek|kimi", "2026-11", reasoning_replay="require",
          reasoning_field="reasoning_content", placeholder=" ", drop=("temperature", "top_p")),
    Quirk("opencode_go", r"deepseek|kimi", "2026-11", reasoning_replay="require",
          reasoning_field="reasoning_content", placeholder=" ", drop=("temperature", "top_p")),
    Quirk(
        "openai", "", "2026-11", keep=OPENAI_ONLY,
        max_tokens="", message_keep=("refusal", "audio", "phase"), system_role="",
        lead_system=False, flat="", own_tools=True, custom_tools=True, functions=True,
        files=("data", "id"), audio=True, metadata_needs_store=True, efforts=(),
    ),
    Quirk("openai", OPENAI_REASONING, "2026-11", drop=(*SAMPLING, *LOGPROBS),
          max_tokens="max_completion_tokens", system_role="developer",
          efforts=("none", "minimal", "low", "medium", "high", "xhigh"), infers_effort=True),
    Quirk("openai", r"^o\d", "2026-11", drop=("stop",), efforts=("low", "medium", "high")),
    Quirk("openai", r"^gpt-5(?!\.|.*-chat)", "2026-11",
          efforts=("minimal", "low", "medium", "high")),
    Quirk("openai", r"^gpt-(?:5\.|[6-9])(?!.*-chat)", "2026-11",
          efforts=("none", "low", "medium", "high", "xhigh")),
    Quirk("anthropic", "", "2026-11", native=True),
    Quirk("codex", "", "2026-11", native=True, custom_tools=True),
    Quirk(
        "local", "", "2026-10", keep=(*OPEN_SAMPLING, "metadata"),
        alternate=True, no_null=True,
        efforts=("none", "low", "medium", "high"),
    ),
    Quirk("local", r"llama-?3", "2026-10", single_call=True),
    Quirk("ollama_cloud", "", "2026-10", efforts=("none", "low", "medium", "high")),
    Quirk("*", r"gemma", "2026-10", alternate=True),
    Quirk("openrouter", r"gemma", "2026-10", alternate=False),
    Quirk(
        "xai", "", "2026-11", drop=("presence_penalty", "frequency_penalty", "stop"),
        max_tokens="", lead_system=False, own_tools=True,
        efforts=("low", "medium", "high"),
    ),
    Quirk("xai", r"non-reasoning|grok-2|grok-3(?!-mini)", "2026-11",
          keep=("presence_penalty", "frequency_penalty", "stop"), efforts=()),
    Quirk("xai", r"grok-4(?![.\d])", "2026-11", efforts=()),
    Quirk(
        "deepseek", "", "2026-11", keep=("thinking",), drop=("logit_bias",),
        max_stop=16, lead_system=False, flat="all", choosing_stops_thinking=True,
        json_schema=False,
        message_keep=("prefix",),
        # a made-up text breaks its answers (lingtai-kernel#9): without it there is no thinking
        reasoning_replay="require", reasoning_field="reasoning_content", placeholder="",
        thinking="toggle", efforts=("high", "max"), infers_effort=True,
    ),
    Quirk("together", "", "2026-11", prefill=True, keep=OPEN_SAMPLING,
          efforts=("low", "medium", "high")),
    Quirk(
        # cache_control: "Extra inputs are not permitted" (ccr#377)
        "fireworks", "", "2026-11", prefill=True,
        max_tokens="", unstreamed_max_tokens=4096, keep=OPEN_SAMPLING,
        efforts=("none", "low", "medium", "high"),
        reasoning_replay="accept", reasoning_field="reasoning_content",
    ),
    Quirk(
        "venice", "", "2026-09",  # "Unrecognized key(s) in object" (extended_openai#284)
        allow=(
            *COMMON, *OPEN_SAMPLING[:2], "repetition_penalty", "max_completion_tokens",
            "seed", "presence_penalty", "frequency_penalty", "logprobs", "top_logprobs",
            "parallel_tool_calls", "venice_parameters",
        ),
        keep=("top_k", "min_p", "repetition_penalty", "reasoning_effort"),
        extra=(("venice_parameters", '{"include_venice_system_prompt": false}'),),
        max_tokens="", efforts=("low", "medium", "high"),
    ),
    Quirk(
        "cloudflare", "", "2026-11",  # tiny default output (freellmapi#553)
        drop=LOGPROBS, keep=("top_k", "repetition_penalty"),
        default_max_tokens=8192, flat="all", no_null=True,
        strict_tools=False, efforts=(),
    ),
)  # fmt: skip

ADDING = ("drop", "keep", "rename", "limits", "extra", "message_drop", "message_keep")


def quirks_of(provider: str, model: str) -> Quirk:
    """All rows for one (provider, model), laid over one another."""
    name, merged = model.lower(), Quirk(provider, model, "")
    for row in QUIRKS:
        if row.provider in ("*", provider) and re.search(row.family, name):
            merged = replace(merged, **laid_over(merged, row))
    return merged


def laid_over(below: Quirk, row: Quirk) -> dict[str, Any]:
    """The fields that `row` changes."""
    changed: dict[str, Any] = {}
    for member in fields(Quirk)[3:]:
        said = getattr(row, member.name)
        if member.name in ADDING:
            changed[member.name] = getattr(below, member.name) + said
        elif said is not None:
            changed[member.name] = said
    return changed


# --- schemas ------------------------------------------------------------------


@dataclass(frozen=True)
class SchemaRules:
    """The part of JSON Schema that a provider understands."""

    allow: frozenset[str] = frozenset()  # empty = all but `deny`
    deny: frozenset[str] = frozenset()
    plain: bool = False  # one type, no branches, enums of strings: Google's Schema message


NOTED = (
    "const", "format", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "multipleOf", "minLength", "maxLength", "minItems", "maxItems", "uniqueItems",
    "minProperties", "maxProperties", "default",
)  # fmt: skip
UNKNOWN_TO_MOST = frozenset((
    "$schema", "$id", "$anchor", "$comment", "$defs", "definitions", "$ref", "$dynamicRef",
    "$dynamicAnchor", "$vocabulary",
))  # fmt: skip
SCHEMAS: Mapping[str, SchemaRules] = {
    # An unknown keyword is a 400 "Unknown name"; beside anyOf nothing else may stand
    # (llmgateway#1763, claudish#234; seen 2026-10).
    "gemini": SchemaRules(
        allow=frozenset((
            "type", "format", "title", "description", "nullable", "enum", "items", "properties",
            "required", "minItems", "maxItems", "minProperties", "maxProperties", "minLength",
            "maxLength", "pattern", "minimum", "maximum", "propertyOrdering",
        )),
        plain=True,
    ),
    # 400 wrong_api_format (ccr#708, 2026-08)
    "cerebras": SchemaRules(
        deny=UNKNOWN_TO_MOST
        | frozenset((
            "minItems", "maxItems", "uniqueItems", "contains", "minContains", "maxContains",
            "pattern", "format", "patternProperties", "propertyNames", "minProperties",
            "maxProperties", "if", "then", "else", "not", "dependentRequired", "dependentSchemas",
            "dependencies", "unevaluatedItems", "unevaluatedProperties", "prefixItems",
        )),
    ),
    "cohere": SchemaRules(deny=UNKNOWN_TO_MOST | {"additionalProperties", "prefixItems"}),
}  # fmt: skip
# Google's formats by type; any other is a 400
PLAIN_FORMATS: Mapping[str, tuple[str, ...]] = {
    "string": ("enum", "date-time"), "integer": ("int32", "int64"), "number": ("float", "double"),
}  # fmt: skip
# Google's keywords that stand on one type only
ONLY_ON: Mapping[str, str] = {
    "properties": "object", "required": "object", "propertyOrdering": "object",
    "minProperties": "object", "maxProperties": "object", "items": "array",
    "prefixItems": "array", "minItems": "array", "maxItems": "array",
}  # fmt: skip
JSON_TYPES = ("object", "array", "string", "number", "integer", "boolean")
SCHEMA_DEPTH, SCHEMA_NODES = 24, 4000  # beyond that a schema is cut: inlined refs can explode
NUMBERS = frozenset((
    "minItems", "maxItems", "minProperties", "maxProperties", "minLength", "maxLength",
    "minimum", "maximum",
))  # fmt: skip
TEXTS = frozenset(("format", "title", "description", "pattern"))


def fit_schema(schema: object, rules: SchemaRules, parameters: bool = False) -> Json:
    """`schema` in the words a provider knows; what goes is told in the descriptions.

    Takes any JSON and never changes it. With `parameters` the result is always an object's.
    """
    fitted = SchemaFitter(schema, rules).fit(schema, 0, ())
    if parameters and fitted.get("type") != "object":
        fitted = {**(fitted if "properties" in fitted else {"properties": {}}), "type": "object"}
    return fitted


class SchemaFitter:
    """One pass over one schema: resolves its references and counts its nodes."""

    def __init__(self, root: object, rules: SchemaRules) -> None:
        self._root, self._rules = root, rules
        self._left = SCHEMA_NODES

    def fit(self, node: object, depth: int, trail: tuple[str, ...]) -> Json:
        """One node; `trail` holds the references that led here, so that cycles end."""
        self._left -= 1
        if not isinstance(node, dict) or self._left < 0:
            return {"type": "string"} if self._rules.plain else {}
        if depth > SCHEMA_DEPTH:
            return {"type": "object", "description": "(not described any deeper)"}
        node, trail = self._resolved(node, trail)
        node = self._merged(node, trail)
        notes: list[str] = []
        if self._rules.plain:
            node = plain_types(node, notes)
        fitted = {
            name: value
            for name, value in node.items()
            if self._knows(name, value) and not (name in NUMBERS and not is_number(value))
        }
        notes += self._notes(node, fitted)
        self._descend(node, fitted, depth + 1, trail)
        if notes:
            text = fitted.get("description")
            said = f"{text} " if isinstance(text, str) and text else ""
            fitted["description"] = f"{said}({'; '.join(notes)})"
        return fitted

    def _knows(self, name: str, value: object) -> bool:
        rules = self._rules
        if name in TEXTS and not isinstance(value, str):
            return False
        return name in rules.allow if rules.allow else name not in rules.deny

    def _notes(self, node: Json, fitted: Json) -> list[str]:
        """The constraints that were left out, in words."""
        gone = (name for name in NOTED if name in node and name not in fitted)
        return [f"{name}: {short_json(node[name])}" for name in gone]

    def _descend(self, node: Json, fitted: Json, depth: int, trail: tuple[str, ...]) -> None:
        """Fit what lies below; the names of properties are names, never keywords."""
        properties = node.get("properties")
        if isinstance(properties, dict):
            below = {name: self.fit(sub, depth, trail) for name, sub in properties.items()}
            fitted["properties"] = below
        else:
            below = {}
            fitted.pop("properties", None)
        self._require(node, fitted, below)
        if (items := self._items(node, depth, trail)) is not None:
            fitted["items"] = items
        else:
            fitted.pop("items", None)
        for name in ("anyOf", "oneOf", "allOf"):
            if name in fitted:
                branches = [self.fit(sub, depth, trail) for sub in as_list(fitted.pop(name))]
                fitted |= {name: branches} if branches else {}
        if isinstance(fitted.get("additionalProperties"), dict):
            rest = fitted["additionalProperties"]
            fitted["additionalProperties"] = self.fit(rest, depth, trail)

    def _require(self, node: Json, fitted: Json, properties: Json) -> None:
        """`required` and the order of properties: each name once, and only names that exist."""
        for name in ("required", "propertyOrdering"):
            wanted = [n for n in as_list(node.get(name)) if isinstance(n, str) and n in properties]
            fitted.pop(name, None)
            if wanted and (not self._rules.allow or name in self._rules.allow):
                fitted[name] = list(dict.fromkeys(wanted))

    def _items(self, node: Json, depth: int, trail: tuple[str, ...]) -> Json | None:
        """What an array holds: of a tuple, its first member. None when this is no array."""
        items = node.get("items")
        tuple_of = [sub for sub in as_list(node.get("prefixItems")) + as_list(items) if sub]
        if isinstance(items, dict):
            return self.fit(items, depth, trail)
        if tuple_of:
            return self.fit(tuple_of[0], depth, trail)
        kind = node.get("type")
        return self.fit({}, depth, trail) if kind == "array" else None

    def _resolved(self, node: Json, trail: tuple[str, ...]) -> tuple[Json, tuple[str, ...]]:
        """A node in which `$ref` is replaced by what it points to."""
        for _ in range(SCHEMA_DEPTH):
            if "$ref" not in node:
                break
            ref = node["$ref"]
            rest = {name: value for name, value in node.items() if name != "$ref"}
            found = self._find(ref) if isinstance(ref, str) and ref not in trail else None
            if found is None:
                name = str(ref).rpartition("/")[2][:60] if isinstance(ref, str) else "any"
                return {"type": "object", "description": f"(like {name} above)"} | rest, trail
            node, trail = {**found, **rest}, (*trail, ref)
        return node, trail

    def _find(self, ref: str) -> Json | None:
        """What a reference inside this schema points to."""
        if not ref.startswith("#"):
            return None
        found: Any = self._root
        for step in ref[1:].split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else None

    def _merged(self, node: Json, trail: tuple[str, ...]) -> Json:
        """A node without branches, where the provider knows none."""
        if "const" in node and "enum" not in node:
            node = {**without(node, ("const",)), "enum": [node["const"]]}
        if not self._rules.plain:
            return node
        for name in ("allOf", "anyOf", "oneOf"):
            branches = [self._branch(sub, trail) for sub in as_list(node.get(name))[:40]]
            branches = [branch for branch in branches if branch]
            node = without(node, (name,))
            if branches:
                node = all_of(node, branches) if name == "allOf" else one_of(node, branches)
        return node

    def _branch(self, node: object, trail: tuple[str, ...]) -> Json:
        """One branch, itself without branches."""
        self._left -= 1
        if not isinstance(node, dict) or self._left < 0 or len(trail) > SCHEMA_DEPTH:
            return {}
        node, trail = self._resolved(node, trail)
        return self._merged(node, (*trail, ""))


def as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def without(members: Json, names: Iterable[str]) -> Json:
    """A copy without some members."""
    return {name: value for name, value in members.items() if name not in names}


def short_json(value: object) -> str:
    text = dump_json(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."


def all_of(node: Json, branches: list[Json]) -> Json:
    """What must hold at once, in one node: members add up, the first word on a keyword counts."""
    merged: Json = {}
    for part in (node, *branches):
        properties = {**as_dict(merged.get("properties")), **as_dict(part.get("properties"))}
        required = as_list(merged.get("required")) + as_list(part.get("required"))
        merged = {**part, **merged}
        if properties:
            merged["properties"] = properties
        if required:
            merged["required"] = required
    return merged


def one_of(node: Json, branches: list[Json]) -> Json:
    """What may hold, in one node: objects are merged, enums joined, else the first branch."""
    real = [branch for branch in branches if branch.get("type") != "null"]
    nullable = {"nullable": True} if len(real) < len(branches) else {}
    if not real:
        return {**node, **nullable}
    first = real[0]
    if len(real) > 1 and all(isinstance(branch.get("properties"), dict) for branch in real):
        required = [set(map(str, as_list(branch.get("required")))) for branch in real]
        shared = [name for name in as_list(first.get("required")) if is_in_all(name, required)]
        first = {**all_of({}, real), "required": shared}
    elif len(real) > 1 and all(isinstance(branch.get("enum"), list) for branch in real):
        first = {**first, "enum": [value for branch in real for value in branch["enum"]]}
    elif len(real) > 1:
        others = ", ".join(str(b.get("type") or "another shape")[:40] for b in real[1:6])
        said = first.get("description")
        said = f"{said} " if isinstance(said, str) else ""
        first = {**first, "description": f"{said}(or: {others})"}
    merged = all_of(node, [first])
    if "description" in node and isinstance(first.get("description"), str):
        merged["description"] = f"{node['description']} {first['description']}"
    return {**merged, **nullable}


def is_in_all(name: object, sets: list[set[str]]) -> bool:
    return all(str(name) in names for names in sets)


def as_dict(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def plain_types(node: Json, notes: list[str]) -> Json:
    """One type, null as `nullable`, and an enum of strings that are not empty."""
    node, kinds = dict(node), node.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    known = [kind.lower() for kind in kinds if isinstance(kind, str)]
    real = [kind for kind in known if kind in JSON_TYPES]
    if "null" in known or node.get("nullable") is True:
        node["nullable"] = True
    else:
        node.pop("nullable", None)
    if len(real) > 1:
        notes.append(f"or: {', '.join(real[1:])}")
    values = node.pop("enum", None)
    if isinstance(values, list):
        if None in values:
            node["nullable"] = True
        texts = [v if isinstance(v, str) else short_json(v) for v in values if v is not None]
        if texts := list(dict.fromkeys(text for text in texts if text)):
            plain = without(node, (*NUMBERS, *ONLY_ON, "format", "pattern"))
            return {**plain, "type": "string", "enum": texts}
    kind = node["type"] = real[0] if real else likely_type(node)
    if "format" in node and node["format"] not in PLAIN_FORMATS.get(kind, ()):
        notes.append(f"format: {short_json(node.pop('format'))}")
    return {name: value for name, value in node.items() if ONLY_ON.get(name, kind) == kind}


def likely_type(node: Json) -> str:
    """The type of a node that names none."""
    if isinstance(node.get("properties"), dict):
        return "object"
    return "array" if "items" in node or "prefixItems" in node else "string"


# --- the history, for every provider ------------------------------------------

NO_RESULT: Final = "[no result]"
BRIDGE: Final = "OK."  # Mistral takes no empty assistant message
CONTINUE: Final = "Continue."
NO_SIGNATURE: Final = "skip_thought_signature_validator"  # Google's documented stand-in, 2026-05
CALL_KEYS = frozenset(("id", "type", "function"))
FUNCTION_KEYS = frozenset(("name", "arguments"))
PLAIN_KEYS = frozenset(("role", "content"))
BASE_KEYS = {
    "system": PLAIN_KEYS,
    "developer": PLAIN_KEYS,
    "user": PLAIN_KEYS,
    "tool": PLAIN_KEYS | {"tool_call_id"},
}
ANSWER_KEYS = (PLAIN_KEYS, PLAIN_KEYS | {"tool_calls"})
OLDER: Final = "\0function:"  # begins the id given to a call of the older kind
RESULT_ROLES = ("tool", "function")


def repaired(messages: Sequence[Json], custom: bool = False) -> list[Json]:
    """A history in which every tool call has one result, right behind it and in the same order.

    Missing results are made up, those without a call become the user's words, ids used twice
    get another end. `custom` = custom calls may stay what they are. The input is not changed.
    """
    out: list[Json] = []
    seen: set[str] = set()
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        calls = made_calls(message)
        if not calls:
            out.append(orphan(message) if message.get("role") in RESULT_ROLES else tidy(message))
            continue
        end = at
        while end < len(messages) and messages[end].get("role") != "assistant":
            end += 1
        out += tool_turn(message, calls, messages[at:end], seen, custom)
        at = end
    return out


def made_calls(message: Json) -> list[Json]:
    """The tool calls of an assistant message, the older function_call among them."""
    if message.get("role") != "assistant":
        return []
    calls = [call for call in as_list(message.get("tool_calls")) if isinstance(call, dict)]
    older = message.get("function_call")
    if not calls and isinstance(older, dict):
        return [{"id": f"{OLDER}{older.get('name')}", "type": "function", "function": older}]
    return calls


def tidy(message: Json) -> Json:
    """A message that calls nothing, without members that say so."""
    if "tool_calls" not in message and "function_call" not in message:
        return message
    return without(message, ("tool_calls", "function_call"))


def tool_turn(
    message: Json, calls: list[Json], behind: Sequence[Json], seen: set[str], custom: bool
) -> list[Json]:
    """An assistant message with calls, their results, and what else stood before the next one."""
    waiting: list[tuple[str, Json]] = []  # (id as the client wrote it, call)
    for call in calls:
        given = call.get("id") if isinstance(call.get("id"), str) else ""
        waiting.append((given or "", sound_call(call, unused_id(given or "", seen), custom)))
    answers: dict[int, Json] = {}
    rest: list[Json] = []
    for said in behind:
        place = answered_place(said, waiting, answers)
        if place is None:
            rest.append(orphan(said) if said.get("role") in RESULT_ROLES else tidy(said))
        else:
            answers[place] = result_message(said, waiting[place][1]["id"])
    new = [call for _, call in waiting]
    results = [answers.get(n) or missing_result(call) for n, call in enumerate(new)]
    same = len(new) == len(as_list(message.get("tool_calls"))) and all(map(is_same, new, calls))
    if not same or "function_call" in message:
        message = {**without(message, ("function_call",)), "tool_calls": new}
    return [message, *results, *rest]


def is_same(left: object, right: object) -> bool:
    return left is right


def answered_place(
    said: Json, waiting: list[tuple[str, Json]], answers: Mapping[int, Json]
) -> int | None:
    """Which of the waiting calls a message answers; None for a message that is no result."""
    role = said.get("role")
    if role not in RESULT_ROLES:
        return None
    wanted = said.get("tool_call_id") if role == "tool" else f"{OLDER}{said.get('name')}"
    for place, (given, _) in enumerate(waiting):
        if given == (wanted or "") and place not in answers:
            return place
    return None


def unused_id(wanted: str, seen: set[str]) -> str:
    """`wanted`, or something like it when it is empty or was used before; noted in `seen`."""
    stem = wanted.replace(OLDER, "call_", 1) or f"call_{len(seen)}"
    id, number = stem, 2
    while id in seen:
        id, number = f"{stem}_{number}", number + 1
    seen.add(id)
    return id


def sound_call(call: Json, id: str, custom: bool) -> Json:
    """A call with id, name and arguments that are a JSON object; the same object if it was so."""
    if call.get("type") == "custom" and isinstance(call.get("custom"), dict):
        if custom:
            return call if call.get("id") == id else {**call, "id": id}
        said = {"input": call["custom"].get("input", "")}
        function: Json = {"name": call["custom"].get("name"), "arguments": said}
    else:
        function = as_dict(call.get("function"))
    name, arguments = function.get("name"), json_arguments(function.get("arguments"))
    if not isinstance(name, str) or not name:
        name = "unknown_tool"
    kept = {k: v for k, v in call.items() if k == "extra_content"}
    sound = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return call if call == {**sound, **kept} else {**sound, **kept}


def json_arguments(value: object) -> str:
    """Arguments as the text of a JSON object; text that is none becomes the member `input`."""
    if isinstance(value, str):
        if value[:1] == "{" and value[-1:] == "}":
            return value
        try:
            parsed = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError):
            parsed = value
        if isinstance(parsed, dict) and value.strip():
            return value
        value = parsed
    if value is None:
        value = {}
    return dump_json(value if isinstance(value, dict) else {"input": value}).decode()


def result_message(said: Json, id: str) -> Json:
    """A result that bears the id of its call; the same object if it did."""
    if said.get("role") == "tool" and said.get("tool_call_id") == id:
        return said
    kept = without(said, ("role", "tool_call_id", "name", "content"))
    content = said.get("content")
    content = "" if content is None else content
    return {"role": "tool", "tool_call_id": id, "content": content, **kept}


def missing_result(call: Json) -> Json:
    return {"role": "tool", "tool_call_id": call["id"], "content": NO_RESULT, "is_error": True}


def orphan(message: Json) -> Json:
    """A result whose call is not there any more, in the user's words."""
    id = message.get("tool_call_id") or message.get("name") or "unknown"
    label = f"[Result of tool call {id}]"
    content = message.get("content")
    if isinstance(content, list):
        return {"role": "user", "content": [{"type": "text", "text": label}, *content]}
    return {"role": "user", "content": f"{label}\n{content or ''}"}


# --- the history, for some providers ------------------------------------------


def split_calls(messages: Iterable[Json]) -> Iterator[Json]:
    """One call a message: assistant, result, assistant, result (llama 3's template, NIM)."""
    queue: list[Json] = []
    for message in messages:
        calls = message.get("tool_calls")
        if message["role"] == "tool" and queue:
            yield queue.pop(0)
        if not calls or len(calls) < 2:
            yield message
            continue
        alone = {"role": "assistant", "content": ""}
        queue = [{**alone, "tool_calls": [call]} for call in calls]
        queue[0] = {**message, "tool_calls": calls[:1]}


def moved_media(messages: Iterable[Json]) -> Iterator[Json]:
    """Images and files of results in a user message behind them: a result is text in Chat."""
    media: list[Json] = []
    for message in messages:
        role, content = message["role"], message.get("content")
        if role != "tool":
            if media:
                yield {"role": "user", "content": media}
                media = []
        elif isinstance(content, list) and any(part.get("type") != "text" for part in content):
            other = [part for part in content if part.get("type") != "text"]
            text = "\n".join(part.get("text") or "" for part in content if part not in other)
            label = f"[From the result of tool call {message.get('tool_call_id')}]"
            media += [{"type": "text", "text": label}, *other]
            message = {**message, "content": text or "[see the next user message]"}
        yield message
    if media:
        yield {"role": "user", "content": media}


def one_system(messages: Sequence[Json]) -> list[Json]:
    """The first system messages as one; later ones as the user's words, with a label."""
    count = 0
    while count < len(messages) and messages[count]["role"] in ("system", "developer"):
        count += 1
    lead = list(messages[:count])
    if count > 1:
        lead = [{**lead[0], "content": joined([m.get("content") for m in lead])}]
    late = (
        {"role": "user", "content": joined(["[System message]", m.get("content")])}
        if m["role"] in ("system", "developer")
        else m
        for m in messages[count:]
    )
    return [*lead, *late]


def joined(contents: Sequence[object], gap: str = "\n\n") -> str | list[Any]:
    """Several contents as one: text if all are text, else a list of parts."""
    if all(isinstance(content, str) for content in contents):
        return gap.join(text for text in cast("Sequence[str]", contents) if text)
    parts: list[Any] = []
    for content in contents:
        if isinstance(content, list):
            parts += content
        elif content:
            parts.append({"type": "text", "text": content})
    return parts


def taking_turns(messages: Iterable[Json]) -> list[Json]:
    """User and assistant in turn, the user first: neighbours of one role are made one."""
    out: list[Json] = []
    for message in messages:
        last = out[-1] if out else {"role": "system"}
        role = message["role"]
        if role == last["role"] and (role == "user" or role == "assistant" and not calls_in(last)):
            content = joined([last.get("content") or "", message.get("content") or ""])
            out[-1] = {**last, **message, "content": content}
            continue
        if role == "assistant" and last["role"] == "system":
            out.append({"role": "user", "content": CONTINUE})
        out.append(message)
    return out


def calls_in(message: Json) -> bool:
    return bool(message.get("tool_calls"))


def bridged(messages: Iterable[Json]) -> Iterator[Json]:
    """An assistant message between a result and whoever speaks next (Mistral, error 3230)."""
    last = ""
    for message in messages:
        if last == "tool" and message["role"] not in ("tool", "assistant"):
            yield {"role": "assistant", "content": BRIDGE}
        last = message["role"]
        yield message


MISTRAL_ID = re.compile(r"[A-Za-z0-9]{9}")
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def nine_character_ids(messages: Sequence[Json]) -> list[Json]:
    """Ids of calls and results as Mistral wants them, the same for the same id every time."""
    ids = [call["id"] for m in messages for call in m.get("tool_calls") or ()]
    fitting = {id: id for id in ids if MISTRAL_ID.fullmatch(id)}
    taken = set(fitting)
    for id in ids:
        if id not in fitting:
            fitting[id] = nine_characters(id, taken)
    return [with_ids(message, fitting) for message in messages]


def nine_characters(id: str, taken: set[str]) -> str:
    """Nine letters and digits made of an id, other than those taken; noted there."""
    for attempt in itertools.count():
        number = int.from_bytes(hashlib.sha256(f"{attempt}:{id}".encode()).digest()[:8], "big")
        digits = "".join(BASE62[number // 62**n % 62] for n in range(9))
        if digits not in taken:
            break
    taken.add(digits)
    return digits


def with_ids(message: Json, ids: Mapping[str, str]) -> Json:
    """A message with other ids; the same object if nothing changes."""
    calls, id = message.get("tool_calls"), message.get("tool_call_id")
    if message["role"] == "tool" and isinstance(id, str) and ids.get(id, id) != id:
        return {**message, "tool_call_id": ids[id]}
    if calls and any(ids[call["id"]] != call["id"] for call in calls):
        return {**message, "tool_calls": [{**call, "id": ids[call["id"]]} for call in calls]}
    return message


# --- one provider and model -----------------------------------------------------

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# thinking.budget_tokens up to this many is the effort beside it
BUDGETS = ((1024, "minimal"), (4096, "low"), (16_384, "medium"), (65_536, "high"))
TEXT_KEYS = frozenset(("type", "text"))
TOOL_KEYS = frozenset(("type", "function"))
DESCRIPTION_KEYS = frozenset(("name", "description", "parameters", "strict"))
IMAGE_KEYS = frozenset(("type", "image_url"))
ZERO_IS_DEFAULT = ("presence_penalty", "frequency_penalty")
MAX_CACHE_MARKS = 4  # Anthropic refuses more, also behind OpenRouter


MemberRule = Callable[[Json, dict[str, object], Any], None]


def is_forced(choice: object) -> bool:
    """Must a tool be called, this one or any?"""
    wanted = choice.get("mode", "required") if isinstance(choice, dict) else choice
    return bool(wanted == "required")


def fit_for(provider: str, model: str) -> Fit:
    """The rules of one (provider, model), compiled: make it once and keep it."""
    return Fit(provider, quirks_of(provider, model))


class Fit:
    """Makes chat bodies fit one provider's rules for one model. Safe to share between threads."""

    def __init__(self, provider: str, quirk: Quirk) -> None:
        self.provider, self.quirk = provider, quirk
        self._drop = frozenset(quirk.drop) - frozenset(quirk.keep)
        self._allow = None if quirk.allow is None else frozenset((*quirk.allow, *quirk.keep))
        self._strip = frozenset(quirk.message_drop) - frozenset(quirk.message_keep)
        self._limits = {name: (low, high) for name, low, high in quirk.limits}
        self._extra = {name: json.loads(text) for name, text in quirk.extra}
        self._schema = SCHEMAS.get(quirk.schema or "")
        self._rules = self._member_rules()
        self._known_tools: tuple[tuple[Any, list[Json]], ...] = ()  # (as given, as sent)
        self._after, self._last_roles = self._role_tables()
        self._keys, self._part_keys = self._message_keys()

    def edits(self, chat: Json) -> dict[str, object]:
        """Top-level members to set, or to remove (DROP), so that the provider takes the chat.

        {} when it is fine as it is, which is decided without copying anything. The chat must
        have passed `validate_chat`; it is never changed.
        """
        edits: dict[str, object] = {}
        if not self.quirk.native:
            self._fit_members(chat, edits)
        messages = chat["messages"]
        if not self._is_sound(messages):
            marked_tools = sum(map(has_mark, chat.get("tools") or ()))
            fitted = self._rewritten(messages, MAX_CACHE_MARKS - marked_tools)
            if self._lacks_reasoning(fitted):
                edits["thinking"] = {"type": "disabled"}
                self._put(chat, edits, "reasoning_effort", DROP)
            if len(fitted) != len(messages) or not all(map(is_same, fitted, messages)):
                edits["messages"] = fitted
        if said := self._lost_format(chat, edits):
            edits["messages"] = with_instruction(cast("Any", edits.get("messages", messages)), said)
        return edits

    def refuses(self, chat: Json) -> str:
        """Why this provider cannot be asked this at all; "" if it can."""
        if self.quirk.native:
            return ""
        for message in chat["messages"]:
            content = message.get("content")
            if type(content) is list:
                for part in content:
                    if why := self._refused_part(part):
                        return why
        return ""

    def _refused_part(self, part: Json) -> str:
        kind = part.get("type")
        if kind == "input_audio" and not self.quirk.audio:
            return f"{self.provider} takes no audio"
        if kind != "file":
            return ""
        file = as_dict(part.get("file"))
        forms = (("file_data", "data"), ("file_id", "id"), ("file_url", "url"))
        given = [form for member, form in forms if file.get(member)]
        if not given or not set(given) & set(self.quirk.files or ()):
            return f"{self.provider} takes no files" + (f" by {given[0]}" if given else "")
        return ""

    # Members of the body

    def _member_rules(self) -> dict[str, MemberRule]:
        """member -> what looks at it; the order of the body does not matter."""
        rules: dict[str, MemberRule] = {
            name: functools.partial(self._limit, name) for name in self._limits
        }
        for name, new in self.quirk.rename:
            rules[name] = functools.partial(self._rename, name, new)
        other = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
        if only := self.quirk.max_tokens:
            rules[other[only]] = functools.partial(self._rename, other[only], only)
        for name in ("thinking", "reasoning_effort", "reasoning"):
            rules[name] = self._fit_effort
        for name in ("tools", "tool_choice", "parallel_tool_calls"):
            rules[name] = self._fit_tools
        if not self.quirk.functions:
            rules["functions"] = rules["function_call"] = self._fit_tools
        rules["stop"] = self._fit_stop
        rules["response_format"] = self._fit_format
        if self.quirk.metadata_needs_store:
            rules["metadata"] = self._fit_metadata
        return rules

    def _fit_members(self, chat: Json, edits: dict[str, object]) -> None:
        rules, drop, allow = self._rules, self._drop, self._allow
        for name, value in chat.items():
            if value is None or (value == 0 and name in ZERO_IS_DEFAULT):
                edits.setdefault(name, DROP)
            elif rule := rules.get(name):
                rule(chat, edits, value)
            elif name in drop or (allow is not None and name not in allow):
                edits[name] = DROP
        quirk = self.quirk
        for name, value in self._extra.items():
            if chat.get(name) is None:
                edits[name] = value
        if quirk.default_max_tokens and edits.get("max_tokens", DROP) is DROP:
            self._put(chat, edits, "max_tokens", chat.get("max_tokens") or quirk.default_max_tokens)
        if quirk.unstreamed_max_tokens and not chat.get("stream"):
            self._stream_long(chat, edits, quirk.unstreamed_max_tokens)
        choice = edits.get("tool_choice", chat.get("tool_choice"))
        if quirk.choosing_stops_thinking and is_forced(choice):
            edits["thinking"] = {"type": "disabled"}
            self._put(chat, edits, "reasoning_effort", DROP)
        tools = edits.get("tools", chat.get("tools"))
        if quirk.single_call and tools and tools is not DROP:
            self._put(chat, edits, "parallel_tool_calls", False)

    def _put(self, chat: Json, edits: dict[str, object], name: str, value: object) -> None:
        """An edit, unless the chat says so already."""
        if value is DROP and name not in chat:
            edits.pop(name, None)
        elif value is DROP or name not in chat or chat[name] != value:
            edits[name] = value
        else:
            edits.pop(name, None)

    def _takes(self, name: str) -> bool:
        return name not in self._drop and (self._allow is None or name in self._allow)

    def _limit(self, name: str, chat: Json, edits: dict[str, object], value: Any) -> None:
        if not self._takes(name):
            edits[name] = DROP
        elif is_number(value):
            low, high = self._limits[name]
            if not low <= value <= high:
                edits[name] = low if value < low else high

    def _rename(
        self, name: str, new: str, chat: Json, edits: dict[str, object], value: Any
    ) -> None:
        edits[name] = DROP
        if chat.get(new) is None and self._takes(new):
            edits[new] = value

    def _fit_stop(self, chat: Json, edits: dict[str, object], value: Any) -> None:
        if not self._takes("stop"):
            edits["stop"] = DROP
            return
        stops = [text for text in ([value] if isinstance(value, str) else value) if text]
        if not stops:
            edits["stop"] = DROP
        elif isinstance(value, list):
            most = self.quirk.max_stop or len(stops)
            if len(stops) != len(value) or len(stops) > most:
                edits["stop"] = stops[:most]

    def _fit_metadata(self, chat: Json, edits: dict[str, object], value: Any) -> None:
        if chat.get("store") is not True:  # OpenAI: only allowed when 'store' is enabled
            edits["metadata"] = DROP

    def _stream_long(self, chat: Json, edits: dict[str, object], ceiling: int) -> None:
        """A long whole answer is asked for as a stream, and put together again."""
        for name in ("max_tokens", "max_completion_tokens"):
            wanted = edits.get(name, chat.get(name))
            if is_integer(wanted) and cast(int, wanted) > ceiling:
                edits["stream"] = True

    def _fit_effort(self, chat: Json, edits: dict[str, object], value: Any) -> None:
        """`reasoning_effort`, `thinking` and `reasoning` say one thing: say it as known here."""
        quirk, word = self.quirk, wished_effort(chat)
        asked = chat.get("reasoning_effort") or as_dict(chat.get("reasoning")).get("effort")
        off = word in ("none", "minimal")
        if "reasoning" in chat and not self._takes("reasoning"):
            edits["reasoning"] = DROP
        thinking: object = DROP
        if word and (quirk.thinking == "toggle" or (quirk.thinking and chat.get("thinking"))):
            given = as_dict(chat.get("thinking"))
            kept = {k: v for k, v in given.items() if k == "clear_thinking"}  # z.ai
            if not off or quirk.thinking == "toggle":
                thinking = {"type": "disabled" if off else "enabled", **kept}
        self._put(chat, edits, "thinking", thinking)
        effort: object = chat.get("reasoning_effort") or DROP
        if quirk.efforts is not None and not (asked or quirk.infers_effort):
            effort = DROP
        elif quirk.efforts is not None:
            toggled_off = off and quirk.thinking == "toggle"
            effort = (not toggled_off and nearest_effort(word, quirk.efforts)) or DROP
        if "reasoning" in chat and self._takes("reasoning"):
            effort = DROP  # OpenRouter refuses both
        self._put(chat, edits, "reasoning_effort", effort)

    def _fit_format(self, chat: Json, edits: dict[str, object], value: Any) -> None:
        if not self._takes("response_format"):
            edits["response_format"] = DROP
            return
        kind = value.get("type")
        if kind == "text" or (self.quirk.json_with_tools is False and wants_tools(chat)):
            edits["response_format"] = DROP
        elif kind == "json_schema" and self.quirk.json_schema is False:
            edits["response_format"] = {"type": "json_object"}
        elif kind == "json_schema" and self._schema:
            wanted = as_dict(value.get("json_schema"))
            schema = fit_schema(wanted.get("schema"), self._schema)
            if schema != wanted.get("schema"):
                edits["response_format"] = {**value, "json_schema": {**wanted, "schema": schema}}

    def _lost_format(self, chat: Json, edits: dict[str, object]) -> str:
        """The answer format that could not be sent, as a sentence; "" if none was lost."""
        if "response_format" not in edits or not wants_json(chat):
            return ""
        wanted, sent = chat["response_format"], edits["response_format"]
        if sent is not DROP and as_dict(sent).get("type") == wanted["type"]:
            return ""
        return format_in_words(wanted)

    # Tools

    def _fit_tools(self, chat: Json, edits: dict[str, object], value: Any) -> None:
        """tools, tool_choice and parallel_tool_calls together; the first of them does all."""
        given, choice = chat.get("tools"), chat.get("tool_choice")
        if not self.quirk.functions:
            if not given:
                given, choice = older_tools(chat), older_choice(chat.get("function_call"))
            for name in ("functions", "function_call"):
                self._put(chat, edits, name, DROP)
        tools: object = self._sent_tools(given) if given else DROP
        choice = self._sent_choice(choice)
        if not tools or tools is DROP or choice is None:
            tools = choice = DROP
            self._put(chat, edits, "parallel_tool_calls", DROP)
        elif "parallel_tool_calls" in chat and not self._takes("parallel_tool_calls"):
            edits["parallel_tool_calls"] = DROP
        if tools is not given or not chat.get("tools"):
            self._put(chat, edits, "tools", tools)
        self._put(chat, edits, "tool_choice", choice)

    def _sent_tools(self, tools: list[Json]) -> list[Json]:
        """The tools as this provider takes them; the same list if nothing changes.

        Schemas are costly, so the last few lists are remembered: agents send the same tools
        with every request.
        """
        if not self._schema:
            return self._fitted_tools(tools)
        known = self._known_tools
        for given, sent in known:
            if given == tools:
                return sent
        sent = self._fitted_tools(tools)
        self._known_tools = ((tools, sent), *known[:3])
        return sent

    def _fitted_tools(self, tools: list[Json]) -> list[Json]:
        names: set[str] = set()
        sent = []
        for tool in tools:
            fitted = self._tool(tool)
            if fitted is None:
                continue
            function = fitted.get("function")
            name = function["name"] if function else ""
            if name not in names:
                sent.append(fitted)
            if name:
                names.add(name)
        return tools if len(sent) == len(tools) and all(map(is_same, sent, tools)) else sent

    def _tool(self, tool: Json) -> Json | None:
        """One tool as it is sent; None if it cannot be."""
        kind = tool.get("type") or "function"
        if kind == "custom":
            if self.quirk.custom_tools:
                return tool
            tool = function_of_custom(tool["custom"])
        elif kind != "function":
            return tool if self.quirk.own_tools else None
        function = self._function(tool["function"])
        keys = TOOL_KEYS | {"cache_control"} if self.quirk.cache_control else TOOL_KEYS
        if function is tool["function"] and tool.get("type") and tool.keys() <= keys:
            return tool
        kept = {k: v for k, v in tool.items() if k in keys}
        return {**kept, "type": "function", "function": function}

    def _function(self, function: Json) -> Json:
        """The description of one function; the same object if nothing changes."""
        quirk = self.quirk
        out = {k: v for k, v in function.items() if k in DESCRIPTION_KEYS and v is not None}
        if quirk.strict_tools is False:
            out.pop("strict", None)
        if not isinstance(out.get("description", ""), str):
            del out["description"]
        if quirk.tool_description and not out.get("description"):
            out["description"] = out["name"]
        if not isinstance(out.get("parameters", {}), dict):
            del out["parameters"]
        if self._schema and "parameters" in out:
            out["parameters"] = fit_schema(out["parameters"], self._schema, parameters=True)
        return function if out == function else out

    def _sent_choice(self, choice: object) -> object:
        """tool_choice in this provider's words, DROP where it has none; None = send no tools."""
        if isinstance(choice, dict):
            choice = named_choice(choice, bool(self.quirk.custom_tools))
        if choice is None:
            return DROP
        known = self.quirk.choices or ("auto", "none", "required", "named")
        word = "named" if isinstance(choice, dict) else str(choice)
        if word in known:
            return choice
        if word == "none":
            return None
        fallbacks = ("auto",) if word == "auto" else ("required", "auto")
        return next((fallback for fallback in fallbacks if fallback in known), DROP)

    # Messages

    def _role_tables(self) -> tuple[dict[str, frozenset[str]], frozenset[str]]:
        """Which role may follow which, and which may be last, in a history that is fine."""
        quirk = self.quirk
        system = {"system"}
        if quirk.native or quirk.system_role == "":
            system = {"system", "developer"}
        late = set() if quirk.lead_system and not quirk.native else system
        any_role = {"user", "assistant", "tool", *late}
        after = {
            "": {"user", "assistant", *system},
            "system": any_role - {"tool"},
            "developer": any_role - {"tool"},
            "user": any_role - {"tool"},
            "assistant": set(any_role),
            "tool": any_role - ({"user", *late} if quirk.tool_order else set()),
        }
        last = {"user", "tool", "assistant"}
        if not quirk.lead_system and not quirk.tool_order:
            last |= system
        if quirk.alternate:
            after["user"].discard("user")
            after["assistant"].discard("assistant")
            for role in ("", "system", "developer"):
                after[role].discard("assistant")
        if quirk.tool_order:
            last.discard("assistant")
        return {role: frozenset(roles) for role, roles in after.items()}, frozenset(last)

    def _message_keys(self) -> tuple[dict[str, frozenset[str]], frozenset[str]]:
        """Members a message, and a part, may have without being looked at."""
        quirk = self.quirk
        extra = {"name"} - self._strip
        calls = {"tool_calls"}
        if quirk.reasoning_field == "reasoning_content":
            calls |= {"reasoning_content"}
        if quirk.native:
            calls |= {"reasoning_content", "reasoning_details"}
        keys = {role: PLAIN_KEYS | extra for role in ("system", "developer", "user")}
        keys["assistant"] = PLAIN_KEYS | extra | calls
        keys["tool"] = PLAIN_KEYS | extra | {"tool_call_id"}
        marks = {"cache_control"} if quirk.cache_control or quirk.native else set()
        return keys, TEXT_KEYS | marks

    def _is_sound(self, messages: Sequence[Json]) -> bool:
        """Is there nothing to do? One pass, no copies; False may be wrong, True never is."""
        after, base, prior = self._after, BASE_KEYS, ""
        waiting: list[str] = []  # ids of calls without a result, the next one last
        seen: set[str] = set()
        for message in messages:
            role = message["role"]
            if role not in after[prior]:
                return False
            prior = role
            if role == "tool":
                if not waiting or message.get("tool_call_id") != waiting.pop():
                    return False
            elif waiting:
                return False
            elif role == "assistant":
                if not self._is_sound_answer(message, seen, waiting):
                    return False
                continue
            plain = message.keys() == base[role] or self._has_sound_keys(message, role)
            if not plain or not (
                type(message["content"]) is str or self._is_sound_list(message["content"], role)
            ):
                return False
        return not waiting and prior in self._last_roles

    def _is_sound_answer(self, message: Json, seen: set[str], waiting: list[str]) -> bool:
        """An assistant message to be left alone; ids of its calls are noted in both lists."""
        if message.keys() not in ANSWER_KEYS and not self._has_sound_keys(message, "assistant"):
            return False
        if "reasoning_content" in message and not has_text(message["reasoning_content"]):
            return False
        content = message.get("content")
        if "tool_calls" in message:
            if content is None and self.quirk.no_null:
                return False
            return (content is None or type(content) is str) and self._are_sound_calls(
                message, seen, waiting
            )
        if type(content) is str:
            return bool(content) or not self.quirk.no_empty
        return self._is_sound_list(content, "assistant")

    def _are_sound_calls(self, message: Json, seen: set[str], waiting: list[str]) -> bool:
        quirk, calls = self.quirk, message["tool_calls"]
        if not calls or (quirk.single_call and len(calls) > 1) or quirk.thought_signatures:
            return False
        if quirk.reasoning_replay == "require" and not message.get("reasoning_content"):
            return False
        for call in calls:
            if call.keys() != CALL_KEYS or call["type"] != "function":
                return False
            id, function = call["id"], call["function"]
            arguments = function.get("arguments")
            if not id or id in seen or function.keys() != FUNCTION_KEYS:
                return False
            if type(arguments) is not str or arguments[:1] != "{" or arguments[-1:] != "}":
                return False
            if quirk.tool_ids and not MISTRAL_ID.fullmatch(id):
                return False
            seen.add(id)
            waiting.insert(0, id)
        return True

    def _has_sound_keys(self, message: Json, role: str) -> bool:
        """Only known members, and none of them null but the content of a message with calls."""
        if not message.keys() <= self._keys[role] or "content" not in message:
            return False
        nulls = sum(value is None for value in message.values())
        return nulls == (message["content"] is None)

    def _is_sound_list(self, content: Any, role: str) -> bool:
        """A list of text and images in the standard's shape."""
        flat = self.quirk.flat
        if type(content) is not list:
            return False
        if flat == "all" or role in ("tool", "assistant") or self.quirk.native:
            return False
        for part in content:
            if part.get("type") == "text":
                if not part.keys() <= self._part_keys:
                    return False
            elif part.keys() != IMAGE_KEYS or type(part["image_url"]) is not dict:
                return False
        return not self.quirk.cache_control

    def _rewritten(self, messages: Sequence[Json], marks: int = MAX_CACHE_MARKS) -> list[Json]:
        """The history as this provider takes it, with so many marks for caching at most.

        Messages that need no change are shared.
        """
        quirk = self.quirk
        out = repaired(messages, custom=bool(quirk.custom_tools))
        if quirk.native:
            return out
        if quirk.single_call:
            out = list(split_calls(out))
        names = self._role_names(out)
        out = [self._message(message, names) for message in out]
        if not quirk.images_in_results:
            out = list(moved_media(out))
        out = [message for message in out if not self._is_void(message)]
        if quirk.cache_control:
            out = with_few_marks(out, marks)
        return self._in_order(out) or [{"role": "user", "content": CONTINUE}]

    def _in_order(self, messages: list[Json]) -> list[Json]:
        """What concerns the order of messages, and ids."""
        quirk, out = self.quirk, messages
        if quirk.lead_system:
            out = one_system(out)
        if quirk.alternate:
            out = taking_turns(out)
        if quirk.tool_order:
            out = list(bridged(out))
        if quirk.tool_ids == "mistral9":
            out = nine_character_ids(out)
        last = out[-1] if out else {"role": "user"}
        if quirk.prefix and last["role"] == "assistant":
            out = [*out[:-1], {**last, "prefix": True}]
        elif last["role"] not in self._last_roles:
            out = [*out, {"role": "user", "content": CONTINUE}]
        return out

    def _role_names(self, messages: Sequence[Json]) -> Mapping[str, str]:
        """role -> the name that this provider knows it by."""
        wanted = self.quirk.system_role
        if wanted == "system":
            return {"developer": "system"}
        if wanted == "developer" and any(m.get("role") == "developer" for m in messages):
            return {"system": "developer"}  # OpenAI: not both in one request
        return {}

    def _is_void(self, message: Json) -> bool:
        """Does an assistant message hold nothing that can be sent?"""
        if message["role"] != "assistant" or message.get("tool_calls"):
            return False
        if message.get("refusal") or message.get("audio"):
            return False
        content = message.get("content")
        return content is None or (not content and bool(self.quirk.no_empty or content == []))

    def _message(self, message: Json, names: Mapping[str, str]) -> Json:
        """One message with the members and contents this provider takes."""
        role, strip = message["role"], self._strip
        out = {k: v for k, v in message.items() if v is not None and k not in strip}
        if role in names:
            out["role"] = names[role]
        content = self._content(role, message.get("content"))
        if content is None and isinstance(message.get("refusal"), str) and "refusal" in strip:
            content = message["refusal"]
        if role == "tool":
            content = content if content is not None else ""
            if message.get("is_error") is True:
                content = marked_error(content)
        if content is not None or "content" in message:
            out["content"] = content
        if role == "assistant":
            self._answer(message, out)
        elif "tool_calls" in out:
            del out["tool_calls"]
        return message if out == message else out

    def _answer(self, message: Json, out: Json) -> None:
        """What only assistant messages have: calls, signatures, reasoning."""
        calls = message.get("tool_calls")
        if calls:
            out["tool_calls"] = self._calls(calls)
            if out.get("content") is None and self.quirk.no_null:
                out["content"] = ""
        if self.quirk.reasoning_replay != "reject":
            out.update(self._replayed(message, bool(calls)))

    def _calls(self, calls: list[Json]) -> list[Json]:
        """Calls with the signature that Gemini wants on the first, or without any."""
        if not self.quirk.thought_signatures:
            return [without(c, ("extra_content",)) if "extra_content" in c else c for c in calls]
        google = as_dict(as_dict(calls[0].get("extra_content")).get("google"))
        if google.get("thought_signature"):
            return calls
        signed = {"google": {**google, "thought_signature": NO_SIGNATURE}}
        return [{**calls[0], "extra_content": signed}, *calls[1:]]

    def _replayed(self, message: Json, called: bool) -> Json:
        """The reasoning of an earlier turn, if it came from here or nobody knows from where."""
        pieces = [p for p in as_list(message.get("reasoning_details")) if isinstance(p, dict)]
        own = [without(p, ("origin",)) for p in pieces if p.get("origin") in (None, self.provider)]
        text = message.get("reasoning_content") or message.get("reasoning")
        if pieces:
            texts = (piece.get("text") or piece.get("summary") for piece in own)
            text = "\n".join(t for t in texts if isinstance(t, str))
        if self.quirk.reasoning_field == "reasoning_details":
            if own:
                return {"reasoning_details": own}
            return {"reasoning": text} if isinstance(text, str) and text else {}
        if not has_text(text):
            text = self.quirk.placeholder if called else ""
        return {"reasoning_content": text} if text else {}

    def _lacks_reasoning(self, messages: Sequence[Json]) -> bool:
        """Must thinking be off, since a turn with calls has lost its reasoning?"""
        quirk = self.quirk
        if quirk.reasoning_replay != "require" or quirk.placeholder:
            return False
        return any(calls_in(m) and not m.get("reasoning_content") for m in messages)

    def _content(self, role: str, content: Any) -> Any:
        """Content in shapes this provider takes: null, text, or a list of known parts."""
        if not isinstance(content, list):
            return content
        parts = [fitted for part in content if (fitted := self._part(part)) is not None]
        if not parts:
            return None if role == "assistant" else ""
        flat = self.quirk.flat
        flatten = flat == "all" or (flat == "tool" and role in ("tool", "assistant"))
        if flatten and all(part.get("type") == "text" for part in parts):
            return "\n".join(str(part.get("text") or "") for part in parts)
        same = len(parts) == len(content) and all(map(is_same, parts, content))
        return content if same else parts

    def _part(self, part: Json) -> Json | None:
        """One part; None for reasoning, which has its own member."""
        kind = part.get("type")
        if kind in ("thinking", "think", "redacted_thinking"):
            return None
        if kind == "refusal":
            return {"type": "text", "text": part.get("refusal") or ""}
        if "cache_control" in part and not self.quirk.cache_control:
            part = without(part, ("cache_control",))
        if kind == "image_url" and isinstance(part.get("image_url"), str):
            part = {**part, "image_url": {"url": part["image_url"]}}
        if kind == "file" and "url" in (self.quirk.files or ()):
            file = as_dict(part.get("file"))
            if file.get("file_url") and not file.get("file_data"):
                named = {**without(file, ("file_url",)), "file_data": file["file_url"]}
                part = {**part, "file": named}
        return part


def format_in_words(wanted: Json) -> str:
    """An answer format as a sentence."""
    schema = as_dict(wanted.get("json_schema")).get("schema")
    if not isinstance(schema, dict):
        return "The final answer must be a JSON object and nothing else."
    text = dump_json(schema).decode()
    return f"The final answer must be JSON and nothing else, fitting this JSON Schema: {text}"


def has_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def marked_error(content: Any) -> Any:
    """The content of a failed result, which says so: Chat has no other place for it."""
    if isinstance(content, list):
        said = any("error" in str(p.get("text", "")).lower()[:200] for p in content)
        return content if said else [{"type": "text", "text": "Error:"}, *content]
    says_so = content == NO_RESULT or "error" in content[:200].lower()
    return content if says_so else f"Error: {content}"


def with_few_marks(messages: list[Json], most: int) -> list[Json]:
    """At most so many marks for caching: the last ones, which cover the most."""
    marks = sum(has_mark(part) for m in messages for part in as_list(m.get("content")))
    out: list[Json] = []
    extra = marks - most
    if extra <= 0:
        return messages
    for message in messages:
        content = message.get("content")
        if extra > 0 and isinstance(content, list) and any(map(has_mark, content)):
            parts = []
            for part in content:
                if has_mark(part) and extra > 0:
                    part, extra = without(part, ("cache_control",)), extra - 1
                parts.append(part)
            message = {**message, "content": parts}
        out.append(message)
    return out


def has_mark(part: object) -> bool:
    return isinstance(part, dict) and "cache_control" in part


def with_instruction(messages: Sequence[Json], text: str) -> list[Json]:
    """`text` at the end of the first system message, or as one of its own."""
    first = messages[0]
    if first["role"] in ("system", "developer"):
        content = joined([first.get("content") or "", text])
        return [{**first, "content": content}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def wished_effort(chat: Json) -> str:
    """How hard to think, in a word of EFFORTS; "on" without a measure; "" if nothing is said."""
    thinking, reasoning = as_dict(chat.get("thinking")), as_dict(chat.get("reasoning"))
    if thinking.get("type") == "disabled" or reasoning.get("enabled") is False:
        return "none"
    for effort in (chat.get("reasoning_effort"), reasoning.get("effort")):
        if isinstance(effort, str) and effort:
            return effort
    for budget in (thinking.get("budget_tokens"), reasoning.get("max_tokens")):
        if is_number(budget):
            return next((word for most, word in BUDGETS if cast(int, budget) <= most), "xhigh")
    return "on" if thinking or reasoning else ""


def nearest_effort(word: str, known: Sequence[str]) -> str:
    """The known word that comes nearest; "" if there is none or nothing was said.

    Only who asks for next to nothing gets "none".
    """
    if word in known:
        return word
    if word not in EFFORTS or not known:
        return ""
    off = word in ("none", "minimal")
    if "default" in known:
        return "none" if off else "default"
    if off and "none" in known:
        return "none"
    place = EFFORTS.index(word)
    choices = [w for w in known if w in EFFORTS and w != "none"]
    return min(choices, key=lambda w: (abs(EFFORTS.index(w) - place), w), default="")


def older_tools(chat: Json) -> list[Json]:
    """`functions` as tools."""
    return [{"type": "function", "function": f} for f in as_list(chat.get("functions"))]


def older_choice(choice: object) -> object:
    """`function_call` as tool_choice."""
    if isinstance(choice, dict):
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice if isinstance(choice, str) else None


def function_of_custom(custom: Json) -> Json:
    """A tool that takes free text as one that takes an object with the member `input`."""
    function: Json = {
        "name": custom["name"],
        "parameters": {
            "type": "object",
            "properties": {"input": {"type": "string"}},
            "required": ["input"],
        },
    }
    if isinstance(custom.get("description"), str):
        function["description"] = custom["description"]
    return {"type": "function", "function": function}


def named_choice(choice: Json, custom: bool) -> object:
    """A choice that is an object, as a word or as the name of a function."""
    kind = choice.get("type")
    if kind == "allowed_tools":
        mode = as_dict(choice.get("allowed_tools")).get("mode") or choice.get("mode")
        return choice if custom else ("required" if mode == "required" else "auto")
    if kind == "custom" and not custom:
        name = as_dict(choice.get("custom")).get("name") or choice.get("name")
        return {"type": "function", "function": {"name": name}}
    return choice


# =============================================================================
# 13. Messages in
# =============================================================================

# The client's side of Anthropic Messages (platform.claude.com/docs/en/api/messages and what Claude
# Code 2.1.197 sends, both as of 2026-11-21): its requests become chats, answers become its own.

MESSAGES_FIELDS: Mapping[str, FieldRule] = {
    "model": FieldRule("a string", is_string),
    "stream": FieldRule("true or false", is_boolean),
    "max_tokens": FieldRule("an integer of at least 1", is_natural),
    "temperature": FieldRule("a number", is_number),
    "top_p": FieldRule("a number", is_number),
    "top_k": FieldRule("an integer", is_integer),
    "stop_sequences": FieldRule("a list of strings", is_strings),
    "tools": FieldRule("a list of tools", is_list),
    "tool_choice": FieldRule("an object with a type", is_typed_object),
    "thinking": FieldRule("an object with a type", is_typed_object),
    "metadata": FieldRule("an object", is_object),
    "output_config": FieldRule("an object", is_object),
    "output_format": FieldRule("an object with a type", is_typed_object),
    "service_tier": FieldRule("a string", is_string),
}
SAME_FIELDS: Final = (
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "stream",
    "thinking",
)
TOOL_CHOICES: Mapping[str, str] = {"auto": "auto", "any": "required", "none": "none"}
# thinking.budget_tokens at least -> reasoning_effort, for clients that say no effort themselves.
EFFORT_BUDGETS: Final = ((16_384, "high"), (4_096, "medium"), (0, "low"))
# First system block of Claude Code: changes with release and request, means nothing to others
# and would defeat their prompt caches.
BILLING_NOTE: Final = "x-anthropic-billing-header:"
MAX_USER_CHARS: Final = 64  # OpenAI answers 400 to a longer `user`; Claude Code's id is JSON
# What can be read in blocks without a chat equal; everything opaque in them is left out.
READABLE: Final = (
    "title",
    "url",
    "source",
    "text",
    "content",
    "stdout",
    "stderr",
    "error_code",
    "tool_name",
    "tool_references",
    "file_id",
)


def messages_to_chat(body: Json) -> Json:
    """A Messages request as a chat; BadRequest names the field that cannot be used.

    Members that have no chat equal (context_management, container, mcp_servers ...) are left
    out, max_tokens may be missing. Tools that run at Anthropic are left out: `server_tools`.
    """
    check_fields(body, MESSAGES_FIELDS)
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise invalid("messages", "a list of at least one message", given)
    messages: list[Json] = []
    if body.get("system") is not None:
        add_system(messages, body["system"], "system")
    for at, message in enumerate(given):
        add_message(messages, message, f"messages[{at}]")
    if all(message["role"] == "system" for message in messages):
        raise BadRequest("messages hold nothing to answer", param="messages")
    chat: Json = {name: body[name] for name in SAME_FIELDS if body.get(name) is not None}
    chat["messages"] = messages
    return {**chat, **tool_members(body), **wish_members(body)}


def wish_members(body: Json) -> Json:
    """Members of the chat that have another name or shape in a Messages request."""
    found: Json = {}
    if body.get("stop_sequences"):
        found["stop"] = list(body["stop_sequences"])
    if user := user_of(body.get("metadata") or {}):
        found["user"] = user
    if effort := asked_effort(body):
        found["reasoning_effort"] = effort
    if wanted := response_format_of(body):
        found["response_format"] = wanted
    if body.get("service_tier") == "standard_only":
        found["service_tier"] = "default"
    return found


def user_of(metadata: Json) -> str:
    """metadata.user_id; a long one by its digest, which tells as little and stays the same."""
    user = metadata.get("user_id")
    if user is not None and not isinstance(user, str):
        raise invalid("metadata.user_id", "a string", user)
    if not user or len(user) <= MAX_USER_CHARS:
        return user or ""
    return hashlib.sha256(user.encode("utf-8", "replace")).hexdigest()[:32]


def asked_effort(body: Json) -> str:
    """output_config.effort, or what the thinking budget amounts to, or "" (as provider likes)."""
    effort = (body.get("output_config") or {}).get("effort")
    if effort is not None and not isinstance(effort, str):
        raise invalid("output_config.effort", "a string", effort)
    thinking = body.get("thinking") or {}
    budget = count_or_zero(thinking.get("budget_tokens"))
    if effort or thinking.get("type") != "enabled" or not budget:
        return effort or ""
    return next(word for least, word in EFFORT_BUDGETS if budget >= least)


def response_format_of(body: Json) -> Json | None:
    """output_config.format, or the older output_format, as response_format."""
    where, wanted = "output_config.format", (body.get("output_config") or {}).get("format")
    if wanted is None:
        where, wanted = "output_format", body.get("output_format")
    if wanted is None:
        return None
    if not is_typed_object(wanted):
        raise invalid(where, "an object with a type", wanted)
    if wanted["type"] != "json_schema":
        raise invalid(f"{where}.type", '"json_schema"', wanted["type"])
    schema = wanted.get("schema")
    if not isinstance(schema, dict):
        raise invalid(f"{where}.schema", "an object", schema)
    named = {"name": "answer", "schema": schema, **({"strict": True} if is_strict(schema) else {})}
    return {"type": "json_schema", "json_schema": named}


def is_strict(schema: object) -> bool:
    """Would OpenAI take this schema with `strict`? Each object closed, each property required."""
    if isinstance(schema, list):
        return all(map(is_strict, schema))
    if not isinstance(schema, dict):
        return True
    if "properties" in schema or schema.get("type") == "object":
        names, required = schema.get("properties"), schema.get("required")
        if not isinstance(names, dict) or not is_strings(required):
            return False
        if set(names) != set(required or ()) or schema.get("additionalProperties") is not False:
            return False
    return all(map(is_strict, schema.values()))


# --- tools ---


@dataclass(frozen=True)
class KnownTool:
    """A tool that Anthropic defines and the client runs: requests name only its type."""

    prefix: str  # of the type, which ends in a date
    description: str
    required: tuple[str, ...]
    members: Mapping[str, str]  # name -> JSON type; commands stand in the description


EDITS: Mapping[str, str] = {
    "command": "string",
    "path": "string",
    "file_text": "string",
    "old_str": "string",
    "new_str": "string",
    "insert_line": "integer",
    "insert_text": "string",
    "view_range": "array",
}
# Members as in platform.claude.com/docs, tool reference, 2026-11.
KNOWN_TOOLS: Final = (
    KnownTool(
        "bash_",
        "Run a command in a persistent bash session, or restart it.",
        (),
        {"command": "string", "restart": "boolean"},
    ),
    KnownTool(
        "text_editor_",
        "View and edit files. command: view (view_range: first and last line), create (file_text),"
        " str_replace (old_str, new_str) or insert (insert_line, insert_text).",
        ("command", "path"),
        EDITS,
    ),
    KnownTool(
        "memory_",
        "Files under /memories that outlive the conversation. command: view, create, str_replace,"
        " insert, delete, or rename (old_path, new_path).",
        ("command",),
        {**EDITS, "old_path": "string", "new_path": "string"},
    ),
)


def tool_members(body: Json) -> Json:
    """tools, tool_choice and parallel_tool_calls of the chat, as far as any tool is left."""
    tools = [
        function_tool(tool, f"tools[{at}]")
        for at, tool in enumerate(body.get("tools") or ())
        if runs_at_client(tool, f"tools[{at}]")
    ]
    choice = tool_choice_of(body.get("tool_choice") or {})
    if not tools:
        return {}
    found: Json = {"tools": tools}
    names = {tool["function"]["name"] for tool in tools}
    if isinstance(choice, str) or (choice and choice["function"]["name"] in names):
        found["tool_choice"] = choice
    if (body.get("tool_choice") or {}).get("disable_parallel_tool_use") is True:
        found["parallel_tool_calls"] = False
    return found


def runs_at_client(tool: Any, where: str) -> bool:
    """Has this tool a schema? Those that run at Anthropic (web_search_20250305 ...) have none."""
    if not isinstance(tool, dict):
        raise invalid(where, "an object with a name and an input_schema", tool)
    kind = tool.get("type")
    if kind is not None and not isinstance(kind, str):
        raise invalid(f"{where}.type", "a string", kind)
    if kind in (None, "custom") or isinstance(tool.get("input_schema"), dict):
        return True
    return known_tool(kind) is not None


def known_tool(kind: str) -> KnownTool | None:
    return next((row for row in KNOWN_TOOLS if kind.startswith(row.prefix)), None)


def known_schema(row: KnownTool) -> Json:
    kinds: Json = {name: {"type": kind} for name, kind in row.members.items()}
    if "view_range" in kinds:
        kinds["view_range"]["items"] = {"type": "integer"}
    return {"type": "object", "properties": kinds, "required": list(row.required)}


def server_tools(body: Json) -> list[str]:
    """Names of the tools that `messages_to_chat` leaves out, for the log and a header."""
    tools = body.get("tools")
    left_out = (
        tool.get("name") or tool.get("type")
        for at, tool in enumerate(tools if isinstance(tools, list) else ())
        if isinstance(tool, dict) and not runs_at_client(tool, f"tools[{at}]")
    )
    return [name for name in left_out if isinstance(name, str)]


def function_tool(tool: Json, where: str) -> Json:
    """One tool as a function; defer_loading, input_examples and the like have no equal."""
    name, schema, about = tool.get("name"), tool.get("input_schema"), tool.get("description")
    if not isinstance(name, str) or not name:
        raise invalid(f"{where}.name", "a string, and not empty", name)
    if schema is not None and not isinstance(schema, dict):
        raise invalid(f"{where}.input_schema", "an object", schema)
    if about is not None and not isinstance(about, str):
        raise invalid(f"{where}.description", "a string", about)
    row = known_tool(tool.get("type") or "")
    if row and schema is None:
        about, schema = row.description, known_schema(row)
    function: Json = {"name": name}
    if about is not None:
        function["description"] = about
    function["parameters"] = schema or {"type": "object", "properties": {}}
    if tool.get("strict") is True and is_strict(schema):
        function["strict"] = True
    return with_cache({"type": "function", "function": function}, tool)


def tool_choice_of(choice: Json) -> Any:
    """auto, required, none, one function, or None when nothing was chosen."""
    kind = choice.get("type")
    if kind == "tool":
        name = choice.get("name")
        if not isinstance(name, str) or not name:
            raise invalid("tool_choice.name", "a string, and not empty", name)
        return {"type": "function", "function": {"name": name}}
    if choice and kind not in TOOL_CHOICES:
        raise invalid("tool_choice.type", "one of auto, any, tool, none", kind)
    return TOOL_CHOICES[kind] if isinstance(kind, str) else None


# --- messages ---


def add_message(messages: list[Json], message: Any, where: str) -> None:
    """The chat messages that one message of the request stands for."""
    if not isinstance(message, dict):
        raise invalid(where, "an object with a role and content", message)
    role, content = message.get("role"), message.get("content")
    if role in ("system", "developer"):
        add_system(messages, content, f"{where}.content")
    elif role == "user":
        messages.extend(user_messages(content, f"{where}.content"))
    elif role == "assistant":
        messages.extend(assistant_messages(content, f"{where}.content"))
    else:
        raise invalid(f"{where}.role", "one of user, assistant, system", role)


def add_system(messages: list[Json], content: Any, where: str) -> None:
    """Instructions: joined with those right before them, or a message where they stand."""
    parts = [
        part
        for block, path in given_blocks(content, where)
        if not str(block.get("text")).startswith(BILLING_NOTE)
        for part in block_parts(block, path)
    ]
    if not parts:
        return
    if messages and messages[-1]["role"] == "system":
        before = messages.pop()["content"]
        parts = (before if isinstance(before, list) else [text_part(before)]) + parts
    messages.append({"role": "system", "content": flat_content(parts)})


def user_messages(content: Any, where: str) -> Iterator[Json]:
    """Results of tools first, as messages of their own; then what the user said."""
    parts: list[Json] = []
    results = 0
    for block, path in given_blocks(content, where):
        kind = block["type"]
        if kind == "tool_result":
            results += 1
            yield tool_message(block, path)
        elif kind in ("tool_use", "thinking", "redacted_thinking"):
            raise invalid(f"{path}.type", "that of a block a user may send", kind)
        else:
            parts += block_parts(block, path)
    if parts or not results:
        yield {"role": "user", "content": flat_content(parts)}


def tool_message(block: Json, where: str) -> Json:
    content, is_error = block.get("content"), block.get("is_error")
    id = string_of(block, "tool_use_id", where)
    if is_error is not None and not isinstance(is_error, bool):
        raise invalid(f"{where}.is_error", "true or false", is_error)
    blocks = [] if content is None else given_blocks(content, f"{where}.content")
    parts = [part for inner, path in blocks for part in block_parts(inner, path)]
    if parts:
        with_cache(parts[-1], block)
    message: Json = {"role": "tool", "tool_call_id": id, "content": flat_content(parts)}
    return {**message, "is_error": True} if is_error else message


def assistant_messages(content: Any, where: str) -> Iterator[Json]:
    """One assistant message, or none if nothing is left of it."""
    parts: list[Json] = []
    calls: list[Json] = []
    pieces: list[Json] = []
    before: Json = {}
    for block, path in given_blocks(content, where):
        kind = block["type"]
        if kind == "tool_result":
            raise invalid(f"{path}.type", "that of a block an assistant may send", kind)
        if kind == "tool_use":
            calls.append(tool_call(block, path))
        elif kind in ("thinking", "redacted_thinking"):
            pieces.append(reasoning_piece(block, path))
        else:
            add_parts(parts, block_parts(block, path), cuts_text(before, block))
        before = block
    pieces = attach_extras(pieces, calls)
    if not (parts or calls or pieces):
        return
    said = flat_content(parts)
    message: Json = {"role": "assistant", "content": said or (None if calls else "")}
    yield {**message, **reasoning_members(pieces), **({"tool_calls": calls} if calls else {})}


def cuts_text(before: Json, block: Json) -> bool:
    """Are two blocks one text? Citations cut sentences into blocks."""
    cited = before.get("citations") or block.get("citations")
    return bool(cited) and before["type"] == block["type"] == "text"


def add_parts(parts: list[Json], more: list[Json], goes_on: bool) -> None:
    if goes_on and parts and more and "cache_control" not in parts[-1]:
        more[0]["text"] = parts.pop()["text"] + more[0]["text"]
    parts += more


def tool_call(block: Json, where: str) -> Json:
    id, name, given = string_of(block, "id", where), block.get("name"), block.get("input")
    if not isinstance(name, str) or not name:
        raise invalid(f"{where}.name", "a string, and not empty", name)
    if given is not None and not isinstance(given, dict):
        raise invalid(f"{where}.input", "an object", given)
    arguments = json.dumps(given or {}, ensure_ascii=False)
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def given_blocks(content: Any, where: str) -> list[tuple[Json, str]]:
    """Content as (block, its path) pairs; a string is one text block."""
    if isinstance(content, str):
        return [({"type": "text", "text": content}, where)]
    if not isinstance(content, list):
        raise invalid(where, "a string or a list of content blocks", content)
    for at, block in enumerate(content):
        if not is_typed_object(block):
            raise invalid(f"{where}[{at}]", "an object with a type", block)
    return [(block, f"{where}[{at}]") for at, block in enumerate(content)]


def string_of(block: Json, name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise invalid(f"{where}.{name}", "a string", value)
    return value


def flat_content(parts: list[Json]) -> str | list[Json]:
    """Parts as a string where that loses nothing: many providers take no list."""
    if all(part["type"] == "text" and "cache_control" not in part for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


# --- content blocks ---


def block_parts(block: Json, where: str) -> list[Json]:
    """The parts of a chat message that one block stands for; cache_control goes to the last.

    Blocks without a chat equal (server_tool_use, web_search_tool_result, container_upload ...)
    become text that begins with their type in brackets; only what can be read of them is kept.
    """
    make = PART_MAKERS.get(block["type"])
    parts = make(block, where) if make else [text_part(labelled(block))]
    parts = [part for part in parts if part["type"] != "text" or part["text"]]
    if parts:
        with_cache(parts[-1], block)
    return parts


def with_cache(part: Json, block: Json) -> Json:
    if isinstance(block.get("cache_control"), dict):
        part["cache_control"] = block["cache_control"]
    return part


def text_part(text: str) -> Json:
    return {"type": "text", "text": text}


def text_parts(block: Json, where: str) -> list[Json]:
    return [text_part(string_of(block, "text", where))]


def image_parts(block: Json, where: str) -> list[Json]:
    kind, source = source_of(block, ("base64", "url", "file"), where)
    if kind == "file":
        return [file_part(file_id=string_of(source, "file_id", f"{where}.source"))]
    url = data_url(source, where) if kind == "base64" else string_of(source, "url", where)
    return [{"type": "image_url", "image_url": {"url": url}}]


def document_parts(block: Json, where: str) -> list[Json]:
    """A PDF as file, a text document as text, with its title and context where it has them."""
    kind, source = source_of(block, ("base64", "text", "url", "content", "file"), where)
    inside = f"{where}.source"
    title, context = (block.get(name) or "" for name in ("title", "context"))
    for name, value in (("title", title), ("context", context)):
        if not isinstance(value, str):
            raise invalid(f"{where}.{name}", "a string", value)
    head = [text_part(context)]
    if kind == "base64":
        name = title or "document.pdf"
        return [*head, file_part(filename=name, file_data=data_url(source, where))]
    if kind == "url":
        return [*head, file_part(filename=title, file_url=string_of(source, "url", inside))]
    if kind == "file":
        return [*head, file_part(filename=title, file_id=string_of(source, "file_id", inside))]
    head = [text_part(f"[{title}]" if title else ""), *head]
    if kind == "text":
        return [*head, text_part(string_of(source, "data", inside))]
    blocks = given_blocks(source.get("content"), f"{inside}.content")
    return head + [part for inner, path in blocks for part in block_parts(inner, path)]


def search_result_parts(block: Json, where: str) -> list[Json]:
    title, source = (string_of(block, name, where) for name in ("title", "source"))
    blocks = given_blocks(block.get("content"), f"{where}.content")
    found = [part for inner, path in blocks for part in block_parts(inner, path)]
    return [text_part(f"[{title}]({source})"), *found]


def source_of(block: Json, kinds: Sequence[str], where: str) -> tuple[str, Json]:
    """(type, source) of an image or a document."""
    source = block.get("source")
    if not isinstance(source, dict):
        raise invalid(f"{where}.source", "an object with a type", source)
    kind = source.get("type")
    if kind not in kinds:
        raise invalid(f"{where}.source.type", f"one of {', '.join(kinds)}", kind)
    return str(kind), source


def data_url(source: Json, where: str) -> str:
    kind = string_of(source, "media_type", f"{where}.source")
    return f"data:{kind};base64,{string_of(source, 'data', f'{where}.source')}"


def file_part(**members: str) -> Json:
    return {"type": "file", "file": {name: value for name, value in members.items() if value}}


def labelled(block: Json) -> str:
    """A block that chat has no part for, as text."""
    kind = block["type"]
    if isinstance(block.get("name"), str):  # server_tool_use, mcp_tool_use
        return f"[{kind} {block['name']}] {json.dumps(block.get('input'), ensure_ascii=False)}"
    return "\n".join([f"[{kind}]", *readable(block)])


def readable(value: Any) -> Iterator[str]:
    """Every text inside a block that people could read."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from readable(item)
    elif isinstance(value, dict):
        for name in READABLE:
            yield from readable(value.get(name))
        if value.get("media_type") == "text/plain":
            yield from readable(value.get("data"))


PART_MAKERS: Mapping[str, Callable[[Json, str], list[Json]]] = {
    "text": text_parts,
    "image": image_parts,
    "document": document_parts,
    "search_result": search_result_parts,
}


# --- reasoning there and back ---
#
# A piece of reasoning travels in the signature of a thinking block: plain signatures as they are,
# anything else (summaries, encrypted pieces, extra_content of a call) as a JSON object without
# its text. No signature begins with a brace.


def reasoning_piece(block: Json, where: str) -> Json:
    """A thinking or redacted_thinking block as reasoning_details has it."""
    if block["type"] == "redacted_thinking":
        origin, value = unseal(string_of(block, "data", where))
        return {"type": "reasoning.encrypted", "data": value, "origin": origin or "anthropic"}
    text, signature = string_of(block, "thinking", where), block.get("signature")
    if signature is not None and not isinstance(signature, str):
        raise invalid(f"{where}.signature", "a string", signature)
    origin, value = unseal(signature or "")
    if signature == value and value:
        origin = "anthropic"  # it was never sealed: native traffic
    came_from = {"origin": origin} if origin else {}
    if piece := carried_piece(value):
        kind = piece["type"].rpartition(".")[2]
        return {**piece, **({kind: text} if kind in ("text", "summary") else {}), **came_from}
    signed = {"signature": value} if value else {}
    return {"type": "reasoning.text", "text": text, **signed, **came_from}


def carried_piece(value: str) -> Json:
    """The piece that a signature of ours carries; {} if it is a plain signature."""
    try:
        piece = json.loads(value) if value.startswith("{") else None
    except (ValueError, RecursionError):
        return {}
    return piece if isinstance(piece, dict) and is_string(piece.get("type")) else {}


def carried(origin: str, piece: Json) -> str:
    """The signature that carries a piece; its text travels in the block itself."""
    rest = {k: v for k, v in piece.items() if k not in ("text", "summary", "origin")}
    if rest.keys() <= {"type", "signature"} and rest.get("type") == "reasoning.text":
        signature = rest.get("signature")
        return seal(origin, signature if isinstance(signature, str) else "")
    return seal(origin, dump_text(rest))


def attach_extras(pieces: list[Json], calls: list[Json]) -> list[Json]:
    """Give calls the extra_content that was carried for them; the other pieces remain."""
    extras = {str(p.get("id")): p.get("extra_content") for p in pieces if p["type"] == "call"}
    for call in calls:
        if isinstance(extra := extras.get(call["id"]), dict):
            call["extra_content"] = extra
    return [piece for piece in pieces if piece["type"] != "call"]


def reasoning_members(pieces: list[Json]) -> Json:
    """reasoning_content and reasoning_details of an assistant message."""
    texts = (piece.get("text") or piece.get("summary") for piece in pieces)
    text = "\n\n".join(text for text in texts if isinstance(text, str) and text)
    found: Json = {"reasoning_details": pieces} if pieces else {}
    return {"reasoning_content": text, **found} if text else found


# --- answers ---

STOP_REASONS: Mapping[str, str] = {
    "length": "max_tokens",
    "content_filter": "refusal",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
}
PLAIN_DELTA: Final = frozenset({"content", "role"})
PING: Final = b'event: ping\ndata: {"type": "ping"}\n\n'
NOT_IN_IDS: Final = re.compile(r"[^a-zA-Z0-9_-]")
JSON_MARKS: Final = re.compile(r'\\.?|["{}\[\]]', re.DOTALL)
CHARS_PER_TOKEN: Final = 4  # for answers whose provider states no usage


class JsonEnd:
    """Finds where one JSON object ends that comes in pieces."""

    def __init__(self) -> None:
        self.found = False
        self._depth = 0
        self._quoted = self._escaped = False

    def feed(self, text: str) -> str:
        """The beginning of `text` that still belongs to the object."""
        if self.found:
            return ""
        start = 1 if self._escaped and text else 0
        self._escaped = self._escaped and not text
        for match in JSON_MARKS.finditer(text, start):
            mark = match[0]
            if mark[0] == "\\":
                self._escaped = len(mark) == 1
            elif mark == '"':
                self._quoted = not self._quoted
            elif not self._quoted:
                self._depth += 1 if mark in "{[" else -1
                if not self._depth:
                    self.found = True
                    return text[: match.end()]
        return text


class Block:
    """One content block of an answer: `held` is text of it that has not been sent yet."""

    complete = False  # nothing more can come
    yields = True  # may end because another block waits
    kind, member = "text_delta", "text"

    def __init__(self, content: Json) -> None:
        self.content = content  # as in content_block_start
        self.index = -1  # until it is open
        self.held = ""

    def add(self, text: str) -> None:
        self.held += text

    def deltas(self) -> list[Json]:
        text, self.held = self.held, ""
        return [{"type": self.kind, self.member: text}] if text else []

    def ending(self) -> list[Json]:
        return []


class RedactedBlock(Block):
    complete = True

    def __init__(self, origin: str, data: str) -> None:
        super().__init__({"type": "redacted_thinking", "data": seal(origin, data)})


class ThinkingBlock(Block):
    """Thinking, and the piece of reasoning_details that it is, once that is known.

    Readers of providers tell reasoning as text first and hand the piece in later, with the same
    text; `unclaimed` is what no piece has accounted for.
    """

    kind, member = "thinking_delta", "thinking"

    def __init__(self, origin: str = "", piece: Json | None = None) -> None:
        super().__init__({"type": "thinking", "thinking": "", "signature": ""})
        self.origin = origin
        self.piece: Json = piece or {}
        self.unclaimed: list[str] = []

    def claims(self, text: str) -> bool:
        """Was this text of a piece sent before the piece came?"""
        _, found, after = "".join(self.unclaimed).partition(text)
        if found:
            self.unclaimed = [after]
            self.complete = not after.strip()
        return bool(found)

    def is_of(self, piece: Json) -> bool:
        """Does the piece go on with this block?"""
        return piece_shape(self.piece) == piece_shape(piece)

    def ending(self) -> list[Json]:
        signature = carried(self.origin, self.piece or {"type": "reasoning.text"})
        return [{"type": "signature_delta", "signature": signature}]


def piece_shape(piece: Json) -> Json:
    """What pieces of one block have in common."""
    return {k: v for k, v in piece.items() if k not in ("text", "summary", "signature")}


class ToolBlock(Block):
    """A tool call; its arguments are sent as they come once it is clear that they are an object.

    Until then they wait: some providers send `{}` first and the arguments after it, others
    fence them, quote them twice or send nothing at all.
    """

    kind, member = "input_json_delta", "partial_json"

    def __init__(self) -> None:
        super().__init__({"type": "tool_use", "id": "", "name": "", "input": {}})
        self.id = self.name = ""
        self.is_custom = self.yields = False
        self.extra: Json = {}  # extra_content, and what of it has been sent
        self.carried: Json = {}
        self._end = JsonEnd()
        self._start: str | None = ""  # arguments that wait

    @property
    def begun(self) -> bool:
        return self._start != ""

    @property
    def cut(self) -> bool:
        """Did the arguments stop in the middle?"""
        return self._start is None and not self.complete

    def continues(self, id: str, name: str, arguments: str) -> bool:
        """Does a delta with this id and name belong to this call? Either may be missing."""
        if not name or not self.name:
            return True
        if id and id == self.id:
            return name == self.name or not self.complete
        if name != self.name:
            return False
        if id and self.id:  # a new id in each delta, or a second call of the same function
            return self.begun and not self.complete
        return not (self.complete and arguments)

    def add(self, text: str) -> None:
        if self._start is None:
            self._send(text)
            return
        start = (self._start + text).lstrip()
        if start[:2] == "{}" and start[2:].lstrip()[:1] == "{":
            start = start[2:].lstrip()
        self._start, self.yields = start, start.rstrip() == "{}"
        if len(start) > 1 and start[0] == "{" and start[1] != "}" and not self.is_custom:
            self._start = None
            self._send(start)

    def _send(self, text: str) -> None:
        self.held += self._end.feed(text)
        self.complete = self.yields = self._end.found

    def ending(self) -> list[Json]:
        if self._start is None:
            return []
        whole = {"input": self._start} if self.is_custom else read_arguments(self._start)
        return [{"type": self.kind, self.member: dump_text(whole)}]


def read_arguments(text: str) -> Json:
    """Arguments as an object, whatever stands around it; {} if there is none."""
    at = text.find("{")
    quoted = text.strip()[:1] == '"'
    try:
        value = json.loads(text) if quoted else json.JSONDecoder().raw_decode(text[max(at, 0) :])[0]
    except (ValueError, RecursionError):
        return {}
    if isinstance(value, str) and quoted:
        return read_arguments(value) if value.strip()[:1] == "{" else {}
    return value if isinstance(value, dict) and at >= 0 else {}


def dump_text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else ""


def object_of(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def list_of(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


class MessageEvents:
    """Canonical chunks to the events of one Messages stream, as objects.

    Blocks queue up: the first is open, the others wait until it has ended. Text and thinking end
    as soon as something else comes; a tool call ends with its arguments. `origin` is the
    provider that answers, if that is known.
    """

    def __init__(self, opening: Opening, origin: str = "") -> None:
        self.text_index = -1  # index of the text block that is open and alone
        self.chars = 0  # of the answer so far
        self._opening = opening
        self._queue: list[Block] = []
        self._started = False
        self._opened = 0  # blocks
        self._blank = ""  # white space that no text has followed yet
        self._calls: dict[object, ToolBlock] = {}
        self._last_call: ToolBlock | None = None
        self._ids: set[str] = set()  # of the calls in this answer
        self._earlier_ids: set[str] = set()  # of those the request tells of, once needed
        self._origin = origin  # of reasoning without a piece
        self._thought = False  # was there a thinking block?
        self._finish = ""
        self._stop_sequence: str | None = None
        self._cut = False
        self._usage: Json = {}

    def start(self) -> list[Json]:
        """message_start, once; its usage is what is known by then."""
        if self._started:
            return []
        self._started = True
        usage = messages_usage(self._usage, self._opening.input_tokens, 0)
        usage.pop("output_tokens_details", None)
        message: Json = {
            "id": f"msg_{self._opening.id}",
            "type": "message",
            "role": "assistant",
            "model": self._opening.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**usage, "output_tokens": min(usage["output_tokens"], 1)},
        }
        return [{"type": "message_start", "message": message}, {"type": "ping"}]

    def feed(self, chunk: Json) -> list[Json]:
        """Events that this chunk completes. A chunk may hold anything at once, or nothing."""
        self._usage = object_of(chunk.get("usage")) or self._usage
        events = self.start()
        for choice in list_of(chunk.get("choices"))[:1]:
            if not isinstance(choice, dict) or choice.get("index"):
                continue
            self._take(object_of(choice.get("delta") or choice.get("message")))
            self._finish = text_of(choice.get("finish_reason")) or self._finish
            self._stop_sequence = text_of(choice.get("stop_sequence")) or self._stop_sequence
        return events + self._advance()

    def finish(self) -> list[Json]:
        """The rest of the answer and its end."""
        events = self.start() + self._advance(last=True)
        if not self._opened and self._finish != "content_filter":
            self._queue.append(Block({"type": "text", "text": ""}))
            events += self._advance(last=True)
        usage = messages_usage(self._usage, self._opening.input_tokens, self.chars)
        stop = {"stop_reason": self._stop_reason(), "stop_sequence": self._stop_sequence}
        if stop["stop_reason"] != "stop_sequence":
            stop["stop_sequence"] = None
        delta = {"type": "message_delta", "delta": stop, "usage": usage}
        return [*events, delta, {"type": "message_stop"}]

    def _stop_reason(self) -> str:
        if self._cut and self._finish == "length":
            return "max_tokens"  # a call whose arguments are incomplete must not be made
        if self._ids:
            return "tool_use"
        reason = STOP_REASONS.get(self._finish, "end_turn")
        if reason == "tool_use":  # said so, but made no call
            reason = "end_turn"
        return "stop_sequence" if reason == "end_turn" and self._stop_sequence else reason

    # what comes in

    def _take(self, delta: Json) -> None:
        thought = text_of(delta.get("reasoning_content")) or text_of(delta.get("reasoning"))
        self.reason(thought, list_of(delta.get("reasoning_details")))
        content = delta.get("content")
        if isinstance(content, str):
            self._say(content)
        for part in list_of(content):
            self._take_part(object_of(part))
        self._say(text_of(delta.get("refusal")))
        for call in list_of(delta.get("tool_calls")):
            if isinstance(call, dict):
                self._take_call(call)

    def _take_part(self, part: Json) -> None:
        """One part of content that is a list (Mistral: thinking holds a list of texts)."""
        if part.get("type") == "thinking":
            texts = (text_of(object_of(t).get("text")) for t in list_of(part.get("thinking")))
            self.reason("".join(texts), [])
        else:
            self._say(text_of(part.get("text")))

    def _say(self, text: str) -> None:
        """Text of the answer. White space alone opens no block: Anthropic refuses it later."""
        if not text:
            return
        self.chars += len(text)
        block = self._queue[-1] if self._queue else None
        if type(block) is not Block:
            text = self._blank + text
            if text.isspace():
                self._blank = text
                return
            block = Block({"type": "text", "text": ""})
            self._push(block)
        block.add(text)

    def _push(self, block: Block) -> None:
        self._queue.append(block)
        self._blank = ""
        self._thought = self._thought or isinstance(block, ThinkingBlock)

    def _thinking(self) -> ThinkingBlock | None:
        """The thinking block that may go on."""
        block = self._queue[-1] if self._queue else None
        return block if isinstance(block, ThinkingBlock) and not block.complete else None

    def reason(self, text: str, pieces: list[Any]) -> None:
        """Reasoning: text alone, or pieces; text beside pieces that have some is the same again."""
        pieces = [piece for piece in pieces if is_typed_object(piece)]
        if text and not any(piece_text(piece) for piece in pieces):
            block = self._thinking()
            if block is None or block.piece:
                # Readers put an empty line between the thoughts of several blocks.
                text = text.removeprefix("\n\n") if self._thought else text
                block = ThinkingBlock(self._origin)
                self._push(block)
            block.add(text)
            block.unclaimed.append(text)
            self.chars += len(text)
        for piece in pieces:
            self._origin = text_of(piece.get("origin")) or self._origin
            self._take_piece(piece)

    def end_piece(self) -> None:
        """What has come of a piece is all of it."""
        if block := self._thinking():
            block.complete = True

    def _take_piece(self, piece: Json) -> None:
        origin, text = text_of(piece.get("origin")), piece_text(piece)
        if piece["type"] == "reasoning.encrypted":
            self._push(encrypted_block(origin, piece))
            return
        block = self._thinking()
        if block is None or not self._belongs(block, piece, text):
            if not text and not piece.get("signature"):
                return
            block = ThinkingBlock(self._origin)
            self._push(block)
            block.add(text)
            self.chars += len(text)
        block.origin = origin or block.origin
        if not block.piece or block.is_of(piece):
            block.piece = {**block.piece, **piece}
        if piece.get("signature"):
            block.complete = True

    def _belongs(self, block: ThinkingBlock, piece: Json, text: str) -> bool:
        """Whether the piece is of this block; text that is new is added to it."""
        if text and block.claims(text):
            return True
        if not block.piece:
            return not text
        if not block.is_of(piece):
            return False
        block.add(text)
        self.chars += len(text)
        return True

    def _take_call(self, delta: Json) -> None:
        function, custom = object_of(delta.get("function")), object_of(delta.get("custom"))
        is_custom = any(custom.values()) and not any(function.values())  # snowflake has both
        named = custom if is_custom else function
        id, name = text_of(delta.get("id")), text_of(named.get("name"))
        value = named.get("input" if is_custom else "arguments")
        arguments = value if isinstance(value, str) else dump_text(value) if value else ""
        call = self._call_for(delta.get("index"), id, name, arguments)
        call.id = call.id or id
        call.is_custom = call.is_custom or is_custom
        if isinstance(value, str) or not call.begun:
            self.chars += len(arguments)
            call.add(arguments)
        call.extra = object_of(delta.get("extra_content")) or call.extra
        is_new = bool(name) and not call.name
        call.name = call.name or name
        if is_new:
            self._name_call(call)
        if call.name:
            self._carry_extra(call)
        if is_new:
            self._push(call)

    def _call_for(self, index: Any, id: str, name: str, arguments: str) -> ToolBlock:
        """The call that a delta goes on with, or a new one; index, id and name may be missing."""
        known = type(index) in (int, str)
        by_id = (c for c in self._calls.values() if id and c.id == id)
        call = self._calls.get(index) if known else next(by_id, self._last_call)
        if call is None or not call.continues(id, name, arguments):
            call = ToolBlock()
        self._calls[index if known else ("call", len(self._calls))] = call
        self._last_call = call
        return call

    def _name_call(self, call: ToolBlock) -> None:
        """Give the block its name, and an id that no other call has, in this answer or before."""
        if not self._ids:
            self._earlier_ids = request_call_ids(self._opening.request)
        id = NOT_IN_IDS.sub("_", call.id)
        if not id or id in self._ids or id in self._earlier_ids:
            id = f"toolu_{self._opening.id}{len(self._ids)}"
        self._ids.add(id)
        call.content.update(id=id, name=call.name)

    def _carry_extra(self, call: ToolBlock) -> None:
        """What belongs to a call but has no place in it (Gemini: the thought's signature)."""
        if call.extra and call.extra != call.carried:
            call.carried = call.extra
            piece = {"type": "call", "id": call.content["id"], "extra_content": call.extra}
            self._push(encrypted_block("", piece))

    # what goes out

    def _advance(self, last: bool = False) -> list[Json]:
        """Events of the open block, and of those that follow it if it has ended."""
        events: list[Json] = []
        queue = self._queue
        while queue:
            block = queue[0]
            if block.index < 0:
                block.index, self._opened = self._opened, self._opened + 1
                start = {"index": block.index, "content_block": block.content}
                events.append({"type": "content_block_start", **start})
            events += block_deltas(block, block.deltas())
            if not (last or block.complete or (len(queue) > 1 and block.yields)):
                break
            events += block_deltas(block, block.ending())
            events.append({"type": "content_block_stop", "index": block.index})
            self._cut = self._cut or (isinstance(block, ToolBlock) and block.cut)
            del queue[0]
        self.text_index = queue[0].index if len(queue) == 1 and type(queue[0]) is Block else -1
        return events


def block_deltas(block: Block, deltas: list[Json]) -> list[Json]:
    return [{"type": "content_block_delta", "index": block.index, "delta": d} for d in deltas]


def piece_text(piece: Json) -> str:
    return text_of(piece.get("text")) or text_of(piece.get("summary"))


def encrypted_block(origin: str, piece: Json) -> Block:
    """Anthropic's own as redacted_thinking; others in the signature of an empty thinking block."""
    if origin == "anthropic" and isinstance(piece.get("data"), str):
        return RedactedBlock(origin, piece["data"])
    block = ThinkingBlock(origin, piece)
    block.complete = True
    return block


def request_call_ids(request: Json) -> set[str]:
    """Ids of the calls that a Messages request tells of."""
    contents = (object_of(message).get("content") for message in list_of(request.get("messages")))
    blocks = (object_of(block) for content in contents for block in list_of(content))
    return {str(block.get("id")) for block in blocks if block.get("type") == "tool_use"}


def messages_usage(usage: Json, input_tokens: int, chars: int) -> Json:
    """Canonical usage as Anthropic counts: input without what was cached; guesses the missing."""
    guess = -(-chars // CHARS_PER_TOKEN)
    prompt = count_or_zero(usage.get("prompt_tokens")) or input_tokens
    details = object_of(usage.get("prompt_tokens_details"))
    read, made = (count_or_zero(details.get(n)) for n in ("cached_tokens", "cache_creation_tokens"))
    found: Json = {
        "input_tokens": max(prompt - read - made, 0),
        "output_tokens": count_or_zero(usage.get("completion_tokens", guess)),
        "cache_creation_input_tokens": made,
        "cache_read_input_tokens": read,
    }
    thought = object_of(usage.get("completion_tokens_details")).get("reasoning_tokens")
    if count_or_zero(thought):
        found["output_tokens_details"] = {"thinking_tokens": thought}
    return found


def count_or_zero(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0


def messages_event(event: Json) -> bytes:
    """One event of a Messages stream, named by its type."""
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), json_bytes(event))


def json_bytes(value: object) -> bytes:
    """JSON in UTF-8; in ASCII if a provider cut a character in half, so that halves can meet."""
    try:
        return JSON_ENCODER.encode(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


JSON_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class MessagesWriter:
    """Canonical chunks to the bytes of one Messages stream; always whole events.

    `feed` the chunks, then `finish` or `fail`; `beat` at any moment in between. After an end
    everything is b"". `origin` is the provider that answers: reasoning it sends without a piece
    goes back to it alone; without `origin` nobody knows whose it is.
    """

    def __init__(self, opening: Opening, origin: str = "") -> None:
        self._events = MessageEvents(opening, origin)
        self._ended = False
        self._prefix, self._prefix_index = b"", -1

    def feed(self, chunk: Json) -> bytes:
        if self._ended:
            return b""
        index = self._events.text_index
        if index >= 0 and (text := plain_text(chunk)):
            self._events.chars += len(text)
            if index != self._prefix_index:
                self._prefix, self._prefix_index = text_prefix(index), index
            return self._prefix + json_bytes(text) + b"}}\n\n"
        if chunk.get("error"):
            self._ended = True
            return messages_event(chunk_error(chunk))
        return b"".join(map(messages_event, self._events.feed(chunk)))

    def finish(self) -> bytes:
        """The normal end: whatever is open is closed, then message_delta and message_stop."""
        if self._ended:
            return b""
        self._ended = True
        return b"".join(map(messages_event, self._events.finish()))

    def fail(self, error: RouterError) -> bytes:
        """The end after a failure: an error event and no message_stop."""
        if self._ended:
            return b""
        self._ended = True
        return messages_event(messages_error(error))

    def beat(self) -> bytes:
        """A ping; the message is begun first, as no client expects anything before that."""
        if self._ended:
            return b""
        return b"".join(map(messages_event, self._events.start())) or PING


def text_prefix(index: int) -> bytes:
    return (
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
        b'"delta":{"type":"text_delta","text":' % index
    )


def plain_text(chunk: Json) -> str:
    """The text of a chunk that holds nothing else, as nearly all do; "" for the others."""
    try:
        (choice,) = chunk["choices"]
        delta = choice["delta"]
        text = delta["content"]
    except (KeyError, TypeError, ValueError):
        return ""
    if type(text) is not str or not delta.keys() <= PLAIN_DELTA or choice.get("index"):
        return ""
    if choice.get("finish_reason") or chunk.get("usage") or chunk.get("error"):
        return ""
    return text


def chat_reply_to_messages(reply: Json, opening: Opening, origin: str = "") -> Json:
    """A whole canonical reply as a message: what a client would collect from its stream."""
    events = MessageEvents(opening, origin)
    choice = next((c for c in list_of(reply.get("choices")) if isinstance(c, dict)), {})
    message = dict(object_of(choice.get("message")))
    thought = text_of(message.pop("reasoning_content", "")) or text_of(message.pop("reasoning", ""))
    take_reasoning(events, thought, list_of(message.pop("reasoning_details", [])))
    choice = {**choice, "index": 0, "delta": indexed(message)}
    chunk = {"choices": [choice], "usage": reply.get("usage")}
    return assembled([*events.feed(chunk), *events.finish()])


def take_reasoning(events: MessageEvents, text: str, pieces: list[Any]) -> None:
    """The reasoning of a whole reply, where each piece is one block."""
    pieces = [piece for piece in pieces if is_typed_object(piece)]
    if not any(piece_text(piece) for piece in pieces):
        events.reason(text, [])
    for piece in pieces:
        events.reason("", [piece])
        events.end_piece()


def indexed(message: Json) -> Json:
    calls = [c for c in list_of(message.get("tool_calls")) if isinstance(c, dict)]
    return {**message, "tool_calls": [{**call, "index": at} for at, call in enumerate(calls)]}


def assembled(events: Iterable[Json]) -> Json:
    """The message that a stream of events amounts to."""
    message: Json = {}
    texts: dict[int, str] = {}
    for event in events:
        kind, at = event["type"], event.get("index", 0)
        if kind == "message_start":
            message = event["message"]
        elif kind == "content_block_start":
            message["content"].append(dict(event["content_block"]))
        elif kind == "content_block_delta":
            name = event["delta"]["type"].removesuffix("_delta")
            add_delta(message["content"][at], name, event["delta"], texts, at)
        elif kind == "message_delta":
            message.update(event["delta"])
            message["usage"].update(event["usage"])
    for at, text in texts.items():
        message["content"][at]["input"] = read_arguments(text)
    return message


def add_delta(block: Json, name: str, delta: Json, texts: dict[int, str], at: int) -> None:
    if name == "input_json":
        texts[at] = texts.get(at, "") + delta["partial_json"]
    else:
        block[name] += delta[name]


# --- errors and counts ---

MESSAGES_ERRORS: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
OVERFLOW_CODE: Final = "context_length_exceeded"
# Claude Code shrinks the conversation when it reads the first, and asks for fewer tokens when
# it reads the second (2.1.197, measured 2026-11-21).
TOO_LONG: Final = re.compile(r"prompt is too long: [\d,]+ tokens > [\d,]+", re.IGNORECASE)
TOO_MUCH: Final = re.compile(r"input length and `max_tokens` exceed context limit: \d")
# A number that stands alone: no part of a model's name, a date or a fraction.
COUNT: Final = re.compile(r"(?<![\w.,-])\d[\d,_]*\d(?![\w-]|\.\d)")


def messages_error(error: RouterError, request_id: str = "") -> Json:
    """The Anthropic error envelope."""
    found = error_event(error.status, error.message, error.code or "", error.sizes)
    return {**found, "request_id": request_id} if request_id else found


def error_event(status: int, message: str, code: str = "", sizes: tuple[int, int] = (0, 0)) -> Json:
    kind = MESSAGES_ERRORS.get(status, "api_error")
    if code == OVERFLOW_CODE:
        kind, message = "invalid_request_error", overflow_message(message, *sizes)
    return {"type": "error", "error": {"type": kind, "message": message}}


def chunk_error(chunk: Json) -> Json:
    """An error inside a stream of canonical chunks."""
    error = object_of(chunk.get("error"))
    found = error_event(embedded_status(chunk), dig_message(chunk) or "the stream failed")
    if error.get("code") == OVERFLOW_CODE:
        return error_event(400, dig_message(chunk), OVERFLOW_CODE)
    if error.get("type") in MESSAGES_ERRORS.values():
        found["error"]["type"] = error["type"]
    return found


def overflow_message(message: str, asked: int = 0, most: int = 0) -> str:
    """A context overflow in the words that make Claude Code act on it.

    `asked` and `most` are its sizes in tokens where they are known: else the text is searched.
    """
    if TOO_LONG.search(message) or TOO_MUCH.search(message):
        return message
    if asked > most > 0:
        return f"prompt is too long: {asked} tokens > {most} maximum ({message})"
    counts = sorted({int(re.sub("[,_]", "", found)) for found in COUNT.findall(message)})
    if len(counts) < 2:
        return f"prompt is too long: {message}"
    return f"prompt is too long: {counts[-1]} tokens > {counts[-2]} maximum ({message})"


def count_messages_tokens(body: Json, encoder: Encoder | None = None) -> int:
    """Input tokens of a Messages request, for count_tokens; an estimate by bytes if need be."""
    return count_all_tokens(messages_to_chat(body), encoder)


def count_all_tokens(chat: Json, encoder: Encoder | None = None) -> int:
    """Input tokens of everything in a chat: text, results, calls, reasoning, tools, media."""
    texts = [chat_text(chat), *(text_of(m.get("reasoning_content")) for m in chat_messages(chat))]
    if wanted := chat.get("response_format"):
        texts.append(dump_text(wanted))
    text = "\n".join(filter(None, texts))
    counted = encoder.count(text) if encoder else None
    if counted is None:
        counted = int(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN)
    media = MEDIA_TOKENS[1] * sum(1 for _ in media_sources(chat))
    return 3 + 4 * len(chat_messages(chat)) + counted + media


# =============================================================================
# 14. Messages out
# =============================================================================

# The provider side of Anthropic Messages. What the API answers 400 to is written down as an
# enforcing checker in tests/claude_rules.py; everything made here has to pass it.

MISSING_RESULT: Final = "[no result]"
NO_OPENING: Final = "[The conversation begins here.]"
GO_ON: Final = "Continue."
MIN_BUDGET: Final = 1024  # thinking.budget_tokens, tokens (API reference, 2026-11)
LEAST_TOP_P: Final = 0.95  # what thinking leaves of top_p (API reference, 2026-11)
MAX_MARKS: Final = 4  # cache_control marks in one request (API reference, 2026-11)
LONG_PREFIX: Final = 4096  # characters from which a prefix is worth a cache mark
MAX_USER_ID: Final = 256
NAME_SIZE: Final = 128
BAD_IN_NAME: Final = re.compile(r"[^a-zA-Z0-9_-]")
IMAGE_TYPES: Final = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp"})
TEXT_TYPES: Final = frozenset({"application/json", "application/xml", "application/yaml"})
SERVER_TOOL: Final = re.compile(r"[a-z][a-z0-9_]*_20\d{6}")  # web_search_20250305
THINKING: Final = ("thinking", "redacted_thinking")
LEVELS: Final = ("low", "medium", "high", "max")
MORE_LEVELS: Final = ("low", "medium", "high", "xhigh", "max")
# How many tokens of thinking an effort stands for, where a model wants a number.
THINKING_BUDGETS: Final = {
    "minimal": 1024,
    "low": 2048,
    "medium": 8192,
    "high": 16_384,
    "xhigh": 24_576,
    "max": 32_000,
}


@dataclass(frozen=True)
class ClaudeTraits:
    """What one family of Messages models takes; the rest is answered with 400.

    `off` tells how thinking is turned off: "omit" (it is only on when asked for), the `type`
    to send ("disabled", "between_tools"), or "never".
    """

    max_output: int = 8192  # tokens
    sampling: Literal["free", "one", "none"] = "free"  # one: temperature or top_p, not both
    thinking: Literal["none", "budget", "adaptive"] = "budget"
    prefill: bool = True  # may the last turn be the assistant's?
    mid_system: bool = False  # may a system message follow a user turn?
    schema: bool = False  # output_config.format
    off: Literal["omit", "disabled", "between_tools", "never"] = "omit"
    forced_tools: bool = True  # tool_choice any and tool
    efforts: tuple[str, ...] = ()  # what output_config.effort may be


CLAUDE_4_5: Final = ClaudeTraits(64_000, "one", schema=True)
CLAUDE_4_6: Final = ClaudeTraits(
    128_000, "one", "adaptive", prefill=False, schema=True, efforts=LEVELS
)
CLAUDE_4_7: Final = replace(CLAUDE_4_6, sampling="none", efforts=MORE_LEVELS)
CLAUDE_5: Final = replace(CLAUDE_4_7, off="disabled")
CLAUDE_5_5: Final = replace(CLAUDE_4_7, mid_system=True, off="never", forced_tools=False)

# (family, traits), the first match counts. Sources: migration guides and "What's new" pages of
# platform.claude.com and users' reports, read 2026-11-21. Ids are compared with "-" for ".".
CLAUDES: Final = (
    (r"claude-(?:instant|[12](?!\d)|3-(?:opus|sonnet|haiku))", ClaudeTraits(4096, thinking="none")),
    (r"claude-3-5-", ClaudeTraits(8192, thinking="none")),
    (r"claude-3-7-", ClaudeTraits(64_000)),
    (r"opus-4-1(?!\d)", ClaudeTraits(32_000, "one", schema=True)),
    (r"(?:opus|sonnet|haiku)-4-5(?!\d)", CLAUDE_4_5),
    (r"(?:opus|sonnet)-4-6(?!\d)", CLAUDE_4_6),
    (r"opus-4-7(?!\d)", CLAUDE_4_7),
    (r"opus-4-8(?!\d)", replace(CLAUDE_4_7, mid_system=True)),
    (r"claude-opus-4(?:-0|-20\d{6})?(?![\d-])", ClaudeTraits(32_000)),
    (r"claude-sonnet-4(?:-0|-20\d{6})?(?![\d-])", ClaudeTraits(64_000)),
    (r"sonnet-5-[5-9]", replace(CLAUDE_5_5, off="between_tools")),
    (r"sonnet-5(?!\d)", CLAUDE_5),
    (r"haiku-5(?!\d)", replace(CLAUDE_5, mid_system=True)),
    (r"opus-5-[5-9]", CLAUDE_5_5),
    (r"opus-5(?!\d)", replace(CLAUDE_5, mid_system=True)),
    (r"claude", replace(CLAUDE_5_5, mid_system=False)),  # Fable, Mythos, and what comes next
)


def claude_traits(model_id: str, max_output: int | None = None) -> ClaudeTraits:
    """The traits of a model; `max_output` in tokens, where the model list knows better.

    Models of other makers behind a Messages address get the most tolerant row.
    """
    spelling = model_id.lower().replace(".", "-")
    found = (traits for pattern, traits in CLAUDES if re.search(pattern, spelling))
    traits = next(found, ClaudeTraits())
    return replace(traits, max_output=max_output) if max_output else traits


# -- the request ---------------------------------------------------------------


def chat_to_messages(
    chat: Json, model: str, traits: ClaudeTraits, origin: str = "anthropic"
) -> Json:
    """The Messages request for a chat; BadRequest for what Messages cannot carry.

    `n`, `seed`, `logprobs`, penalties and `logit_bias` have no equal here and are left out.
    """
    names = ToolNames(chat)
    history = History(traits, origin, names)
    history.read(chat)
    body: Json = {"model": model, "max_tokens": output_limit(chat, traits)}
    body["messages"] = history.turns
    set_tools(body, chat, names, history, traits)
    set_format(body, chat, history, traits)
    set_thinking(body, chat, traits)
    set_sampling(body, chat, traits)
    end_turns(body, traits)
    set_extras(body, chat)
    system: list[Json] = []
    for block in history.system:
        append_text(system, block, joins=True)
    mark_cache(body, system)
    for turn in body["messages"]:
        turn["content"] = plain(turn["content"])
    return {**body, "system": plain(system)} if system else body


def output_limit(chat: Json, traits: ClaudeTraits) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        if asked := natural(chat.get(name)):
            return min(asked, traits.max_output)
    return traits.max_output


def natural(value: object) -> int:
    """A whole number above 0, else 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def plain(content: list[Json]) -> str | list[Json]:
    """A single text without a mark is written as a string."""
    if len(content) == 1 and set(content[0]) == {"type", "text"}:
        return str(content[0]["text"])
    return content


def set_extras(body: Json, chat: Json) -> None:
    """stop, stream, metadata and service tier."""
    stop = chat.get("stop")
    stops = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    kept = [text for text in stops if isinstance(text, str) and text.strip()]
    if kept:  # "each stop sequence must contain non-whitespace"
        body["stop_sequences"] = kept
    if isinstance(chat.get("stream"), bool):
        body["stream"] = chat["stream"]
    metadata = chat.get("metadata")
    known = metadata.get("user_id") if isinstance(metadata, dict) else None
    user = next((u for u in (chat.get("user"), known) if isinstance(u, str) and u), "")
    if user:
        body["metadata"] = {"user_id": user[:MAX_USER_ID]}
    tiers = {"auto": "auto", "default": "standard_only", "standard_only": "standard_only"}
    tier = chat.get("service_tier")
    if isinstance(tier, str) and tier in tiers:
        body["service_tier"] = tiers[tier]


# -- the request: history --------------------------------------------------------


class Call(NamedTuple):
    """A tool call of the last assistant turn: the id the chat gives it, and the one sent."""

    asked: str
    id: str
    name: str


class History:
    """System blocks and turns of a Messages request, made from chat messages run by run.

    A run is all messages in a row that become one turn. Each tool_use gets its tool_result in
    the very next turn, in the order of the calls, before anything else of that turn.
    """

    def __init__(self, traits: ClaudeTraits, origin: str, names: ToolNames) -> None:
        self.traits, self.origin, self.names = traits, origin, names
        self.system: list[Json] = []
        self.turns: list[Json] = []
        self.calls: list[Call] = []  # not answered yet
        self.used: set[str] = set()  # tool_use ids, all different in one request

    def read(self, chat: Json) -> None:
        messages = [item for item in enumerate(chat_messages(chat)) if not is_void(*item)]
        while messages and messages[0][1].get("role") in ("system", "developer"):
            at, message = messages.pop(0)
            self.system += text_blocks(message, f"messages[{at}]")
        for is_assistant, run in itertools.groupby(messages, key=is_of_assistant):
            (self.add_assistant if is_assistant else self.add_user)(list(run))
        self.add_user([])
        if not self.turns and self.system:
            self.turns, self.system = [{"role": "user", "content": self.system}], []
        elif not self.turns or self.turns[0]["role"] != "user":
            self.turns.insert(0, {"role": "user", "content": [text_block(NO_OPENING)]})

    def add(self, role: str, content: list[Json]) -> None:
        if not content:
            return
        if self.turns and self.turns[-1]["role"] == role:
            self.turns[-1]["content"] += content
        else:
            self.turns.append({"role": role, "content": content})

    # What the assistant said

    def add_assistant(self, run: list[tuple[int, Json]]) -> None:
        thoughts: list[Json] = []
        said: list[Json] = []
        uses: list[Json] = []
        for at, message in run:
            fresh = self.thoughts(message)
            thoughts += [block for block in fresh if block not in thoughts]
            for block in text_blocks(message, f"messages[{at}]"):
                append_text(said, block, isinstance(message.get("content"), str))
            uses += [self.tool_use(call) for call in calls_of(message)]
        if said or uses:  # a turn must not end in thinking
            self.add("assistant", [*thoughts, *said, *uses])

    def thoughts(self, message: Json) -> list[Json]:
        """Thinking blocks that this provider signed, as they came; others are dropped."""
        pieces = message.get("reasoning_details")
        if self.traits.thinking == "none" or not isinstance(pieces, list):
            return []
        own = (p for p in pieces if isinstance(p, dict) and p.get("origin") == self.origin)
        return [block for piece in own if (block := thinking_block(piece))]

    def tool_use(self, call: Json) -> Json:
        asked = call.get("id")
        asked = asked if isinstance(asked, str) else ""
        given = self.fresh_id(asked)
        name = call_name(call)
        self.calls.append(Call(asked, given, name))
        block = {"type": "tool_use", "id": given, "name": self.names.out(name)}
        return {**block, "input": call_input(call), **cache_mark(call)}

    def fresh_id(self, asked: str) -> str:
        """The same id for the same history: later turns must not change the cached prefix."""
        stem = BAD_IN_NAME.sub("_", asked) or f"call_{len(self.used)}"
        given, n = stem, 1
        while given in self.used:
            n += 1
            given = f"{stem}_{n}"
        self.used.add(given)
        return given

    # What came back

    def add_user(self, run: list[tuple[int, Json]]) -> None:
        answers: dict[str, Json] = {}
        rest: list[Json] = []
        orders: list[Json] = []
        calls, self.calls = self.calls, []
        for at, message in run:
            where, role = f"messages[{at}]", message.get("role")
            if role in ("system", "developer"):
                orders += text_blocks(message, where)
            elif role in ("tool", "function"):
                call = answered(message, calls, answers)
                if call:
                    answers[call.id] = tool_result(call.id, message, where)
                else:
                    rest += orphan_blocks(message, where)
            else:
                for block in content_blocks(message, where):
                    append_text(rest, block, isinstance(message.get("content"), str))
        missing = {"content": MISSING_RESULT, "is_error": True}
        results = [answers.get(c.id) or tool_result(c.id, missing, "") for c in calls]
        self.add("user", results + rest)
        self.add_orders(orders)

    def add_orders(self, orders: list[Json]) -> None:
        """System messages in the middle: in place where that is allowed, else into `system`.

        They may not come first nor after the assistant (users' reports, 2026-09). Where they
        may stand in place they never go to `system`: newer models bind thinking to the prefix.
        """
        if not orders:
            return
        if not self.traits.mid_system:
            self.system += orders
        elif self.turns and self.turns[-1]["role"] == "user":
            text = "\n".join(block["text"] for block in orders)
            self.turns.append({"role": "system", "content": [text_block(text)]})
        else:
            text = "\n".join(block["text"] for block in orders)
            self.add("user", [text_block(f"[System message]\n{text}")])


def is_void(at: int, message: Json) -> bool:
    """Has the assistant said nothing that can be sent, nor called a tool?"""
    if message.get("role") != "assistant" or calls_of(message):
        return False
    return not text_blocks(message, f"messages[{at}]")


def is_of_assistant(item: tuple[int, Json]) -> bool:
    return item[1].get("role") == "assistant"


def text_block(text: str) -> Json:
    return {"type": "text", "text": text}


def append_text(blocks: list[Json], block: Json, joins: bool) -> None:
    """Texts that were whole messages become one, joined by a newline."""
    last = blocks[-1] if blocks else {}
    if joins and set(last) == {"type", "text"} == set(block):
        blocks[-1] = text_block(f"{last['text']}\n{block['text']}")
    else:
        blocks.append(block)


def calls_of(message: Json) -> list[Json]:
    """Tool calls of an assistant message; the older function_call is one without an id."""
    calls = message.get("tool_calls")
    found = [c for c in calls if isinstance(c, dict)] if isinstance(calls, list) else []
    old = message.get("function_call")
    if not found and isinstance(old, dict):
        found = [{"type": "function", "function": old}]
    return [call for call in found if call_name(call)]


def made_call(call: Json) -> Json:
    made = call.get("custom" if call.get("type") == "custom" else "function")
    return made if isinstance(made, dict) else {}


def call_name(call: Json) -> str:
    name = made_call(call).get("name")
    return name if isinstance(name, str) else ""


def call_input(call: Json) -> Json:
    """The arguments of a call; the text of a custom tool is the `input` of a function."""
    made = made_call(call)
    if call.get("type") != "custom":
        return parse_arguments(made.get("arguments"))
    given = made.get("input")
    return {"input": given if isinstance(given, str) else ""}


def parse_arguments(text: object) -> Json:
    """What is no JSON object is kept as text under "_raw"."""
    if isinstance(text, dict):
        return text
    if not isinstance(text, str) or not text.strip():
        return {}
    try:
        value = DECODER.decode(text)
        if "\\u" in text and find_value(value, is_broken_text) is not None:
            return {"_raw": text}  # half of a surrogate pair cannot be sent
    except (ValueError, RecursionError):
        return {"_raw": text}
    return value if isinstance(value, dict) else {"_raw": text}


def thinking_block(piece: Json) -> Json | None:
    """The block a reasoning piece was; None when it cannot be sent back."""
    kind, text = piece.get("type"), piece.get("text")
    signature, data = piece.get("signature"), piece.get("data")
    if kind == "reasoning.text" and isinstance(signature, str) and signature:
        thinking = text if isinstance(text, str) else ""
        return {"type": "thinking", "thinking": thinking, "signature": signature}
    if kind == "reasoning.encrypted" and isinstance(data, str) and data:
        return {"type": "redacted_thinking", "data": data}
    return None


def answered(message: Json, calls: list[Call], answers: dict[str, Json]) -> Call | None:
    """The first call without an answer that this message answers."""
    asked, name = message.get("tool_call_id"), message.get("name")
    is_old = message.get("role") == "function"
    for call in calls:
        fits = call.name == name if is_old else call.asked == asked
        if fits and call.id not in answers:
            return call
    return None


def tool_result(id: str, message: Json, where: str) -> Json:
    """A tool_result block; with is_error it takes text only, and not none."""
    content = content_blocks(message, where)
    marks = [block.pop("cache_control") for block in content if "cache_control" in block]
    block: Json = {"type": "tool_result", "tool_use_id": id}
    is_error = message.get("is_error") is True and all(b["type"] == "text" for b in content)
    if is_error and not content:
        content = [text_block(MISSING_RESULT)]
    if content:
        block["content"] = plain(content)
    if is_error:
        block["is_error"] = True
    return {**block, "cache_control": marks[-1]} if marks else block


def orphan_blocks(message: Json, where: str) -> list[Json]:
    """The result of a call nobody made, as user text with a label."""
    id, name = message.get("tool_call_id"), message.get("name")
    which = " ".join(word for word in (name, id) if isinstance(word, str) and word)
    label = text_block(f"[Result of an earlier tool call {which}]".replace(" ]", "]"))
    return [label, *content_blocks(message, where)]


# -- the request: parts ----------------------------------------------------------


def cache_mark(holder: Json) -> Json:
    """{"cache_control": ...} if the holder has one that the API knows."""
    mark = holder.get("cache_control")
    if not isinstance(mark, dict) or mark.get("type") != "ephemeral":
        return {}
    ttl = {"ttl": mark["ttl"]} if mark.get("ttl") in ("5m", "1h") else {}
    return {"cache_control": {"type": "ephemeral", **ttl}}


def content_blocks(message: Json, where: str) -> list[Json]:
    """The content of a message as blocks. Blank text is left out: the API refuses it."""
    content = message.get("content")
    if isinstance(content, str):
        blocks = [text_block(content)] if content.strip() else []
    elif isinstance(content, list):
        items = enumerate(content)
        made = (block_from_part(part, f"{where}.content[{at}]") for at, part in items)
        blocks = [block for block in made if block]
    else:
        blocks = []
    if blocks and (mark := cache_mark(message)):
        blocks[-1] = {**blocks[-1], **mark}
    return blocks


def text_blocks(message: Json, where: str) -> list[Json]:
    """The same for roles that have text only; a refusal counts as what was said."""
    blocks = content_blocks(message, where)
    for block in blocks:
        if block["type"] != "text":
            what = f"{where}.content: only user and tool messages may hold an {block['type']}"
            raise BadRequest(what, param=f"{where}.content")
    refusal = message.get("refusal")
    if not blocks and isinstance(refusal, str) and refusal.strip():
        return [text_block(refusal)]
    return blocks


def block_from_part(part: Any, where: str) -> Json | None:
    if isinstance(part, str):
        return text_block(part) if part.strip() else None
    if not isinstance(part, dict):
        raise invalid(where, "an object with a type", part)
    kind = part.get("type")
    if kind == "image_url":
        return {**image_block(part.get("image_url"), where), **cache_mark(part)}
    if kind == "file":
        return {**document_block(part.get("file"), where), **cache_mark(part)}
    text = part.get("refusal") if kind == "refusal" else part.get("text")
    if kind not in ("text", "refusal", "input_text", "output_text") or not isinstance(text, str):
        raise BadRequest(f"{where}: this provider takes no parts of type {kind!r}", param=where)
    return {**text_block(text), **cache_mark(part)} if text.strip() else None


def image_block(image: Any, where: str) -> Json:
    url = image.get("url") if isinstance(image, dict) else image
    where = f"{where}.image_url.url" if isinstance(image, dict) else f"{where}.image_url"
    if not isinstance(url, str):
        raise invalid(where, "an http or data URL", url)
    if url[:8].lower().startswith(("http://", "https://")):
        return {"type": "image", "source": {"type": "url", "url": url}}
    kind, data = split_data_url(url, where)
    if kind not in IMAGE_TYPES:
        wants = ", ".join(sorted(IMAGE_TYPES))
        raise BadRequest(f"{where} must be an image of type {wants}, not {kind!r}", param=where)
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}


def split_data_url(url: str, where: str) -> tuple[str, str]:
    """(media type, base64 text) of a data URL."""
    head, comma, data = url.partition(",")
    words = head[5:].lower().split(";")
    data = "".join(data.split())
    if head[:5].lower() != "data:" or not comma or words[-1].strip() != "base64" or not data:
        raise BadRequest(f"{where} must be an http URL or a base64 data URL", param=where)
    try:
        base64.b64decode(data, validate=True)
    except ValueError:
        raise BadRequest(f"{where} does not hold valid base64", param=where) from None
    kind = words[0].strip()
    return ("image/jpeg" if kind == "image/jpg" else kind), data


def document_block(file: Any, where: str) -> Json:
    """A PDF, a text or an image that came as a file part."""
    where = f"{where}.file"
    if not isinstance(file, dict):
        raise invalid(where, "an object with file_data or file_url", file)
    name, url, data = (file.get(key) for key in ("filename", "file_url", "file_data"))
    title = {"title": name[:500]} if isinstance(name, str) and name.strip() else {}
    if isinstance(url, str) and url[:8].lower().startswith(("http://", "https://")):
        return {"type": "document", "source": {"type": "url", "url": url}, **title}
    if not isinstance(data, str):
        what = f"{where} must have file_data (a data URL) or file_url: other ids are unknown here"
        raise BadRequest(what, param=where)
    if title and title["title"].lower().endswith(".pdf") and not data.startswith("data:"):
        data = f"data:application/pdf;base64,{data}"
    kind, encoded = split_data_url(data, f"{where}.file_data")
    if kind in IMAGE_TYPES:
        return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": encoded}}
    return {"type": "document", "source": document_source(kind, encoded, where), **title}


def document_source(kind: str, encoded: str, where: str) -> Json:
    if kind == "application/pdf":
        return {"type": "base64", "media_type": kind, "data": encoded}
    where = f"{where}.file_data"
    if not kind.startswith("text/") and kind not in TEXT_TYPES:
        raise BadRequest(f"{where} must be a PDF, an image or a text, not {kind!r}", param=where)
    try:
        text = base64.b64decode(encoded).decode()
    except UnicodeDecodeError:
        raise BadRequest(f"{where} must be text in UTF-8", param=where) from None
    if not text.strip():
        raise BadRequest(f"{where} must not be empty", param=where)
    return {"type": "text", "media_type": "text/plain", "data": text}


# -- the request: tools ----------------------------------------------------------


class ToolNames:
    """Tool names of a chat as Anthropic takes them (letters, digits, _ and -), and back.

    `custom` holds the names, as the chat spells them, of tools that take free text.
    """

    def __init__(self, chat: Json) -> None:
        self.sent: dict[str, str] = {}
        self.asked: dict[str, str] = {}
        self.custom: set[str] = set()
        for tool in offered_tools(chat):
            name = tool_name(tool)
            self.out(name)
            if tool.get("type") == "custom":
                self.custom.add(name)

    def out(self, name: str) -> str:
        if name not in self.sent:
            stem = BAD_IN_NAME.sub("_", name)[:NAME_SIZE] or "tool"
            given, n = stem, 1
            while given in self.asked:
                n += 1
                given = f"{stem[: NAME_SIZE - 8]}_{n}"
            self.sent[name], self.asked[given] = given, name
        return self.sent[name]

    def back(self, name: str) -> str:
        return self.asked.get(name, name)


def offered_tools(chat: Json) -> list[Json]:
    """Tools with a name, the first of each name; the older `functions` are tools too."""
    tools, functions = chat.get("tools"), chat.get("functions")
    found = [t for t in tools if isinstance(t, dict)] if isinstance(tools, list) else []
    if not found and isinstance(functions, list):
        found = [{"type": "function", "function": f} for f in functions if isinstance(f, dict)]
    by_name: dict[str, Json] = {}
    for tool in found:
        if name := tool_name(tool):
            by_name.setdefault(name, tool)
    return list(by_name.values())


def tool_name(tool: Json) -> str:
    """The name of a function, a custom tool, or one of Anthropic's own; "" for the rest."""
    kind = tool.get("type") or "function"
    own = isinstance(kind, str) and SERVER_TOOL.fullmatch(kind)
    holder = tool if own else tool.get("custom" if kind == "custom" else "function")
    if kind not in ("function", "custom") and not own:
        return ""
    name = holder.get("name") if isinstance(holder, dict) else None
    return name if isinstance(name, str) else ""


def set_tools(
    body: Json, chat: Json, names: ToolNames, history: History, traits: ClaudeTraits
) -> None:
    mode, only = wanted_choice(chat)
    tools = offered_tools(chat)
    if isinstance(only, list):
        tools = [tool for tool in tools if tool_name(tool) in only]
    made = [tool_definition(tool, names) for tool in tools]
    if not made:
        if used := used_tools(history.turns):  # tool_use without tools is refused
            empty = {"type": "object", "properties": {}}
            body["tools"] = [{"name": name, "input_schema": empty} for name in used]
            body["tool_choice"] = {"type": "none"}
        return
    body["tools"] = made
    if isinstance(only, str) and only not in (tool_name(tool) for tool in tools):
        raise BadRequest(f"tool_choice names {only!r}, which is not in tools", param="tool_choice")
    choice = tool_choice(chat, mode, names.out(only) if isinstance(only, str) else "")
    if choice and choice["type"] in ("any", "tool") and not traits.forced_tools:
        which = f"the tool {choice['name']}" if "name" in choice else "one of the tools"
        history.system.append(text_block(f"Answer this by calling {which}."))
        choice = {**choice, "type": "auto"}
        choice.pop("name", None)
    if choice:
        body["tool_choice"] = choice


def used_tools(turns: list[Json]) -> list[str]:
    blocks = (block for turn in turns for block in turn["content"])
    return list(dict.fromkeys(b["name"] for b in blocks if b["type"] == "tool_use"))


def wanted_choice(chat: Json) -> tuple[str, str | list[str] | None]:
    """(auto, none, any, tool or "", the tool meant or all tools allowed)."""
    choice = chat.get("tool_choice")
    if choice is None and chat.get("functions"):
        choice = chat.get("function_call")
        choice = {"function": choice} if isinstance(choice, dict) else choice
    if isinstance(choice, str):
        return {"required": "any", "any": "any", "none": "none"}.get(choice, "auto"), None
    if not isinstance(choice, dict):
        return "", None
    if choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools")
        allowed = allowed if isinstance(allowed, dict) else choice
        listed = allowed.get("tools")
        items = listed if isinstance(listed, list) else []
        mode = "any" if allowed.get("mode") == "required" else "auto"
        return mode, [chosen_name(item) for item in items if isinstance(item, dict)]
    name = chosen_name(choice)
    return ("tool", name) if name else ("auto", None)


def chosen_name(choice: Json) -> str:
    for holder in (choice.get("function"), choice.get("custom"), choice):
        if isinstance(holder, dict) and isinstance(holder.get("name"), str):
            return str(holder["name"])
    return ""


def tool_choice(chat: Json, mode: str, name: str) -> Json:
    one_only = chat.get("parallel_tool_calls") is False
    if not mode and not one_only:
        return {}
    choice: Json = {"type": mode or "auto"}
    if name:
        choice["name"] = name
    if one_only and mode != "none":
        choice["disable_parallel_tool_use"] = True
    return choice


def tool_definition(tool: Json, names: ToolNames) -> Json:
    kind, mark = tool.get("type"), cache_mark(tool)
    if isinstance(kind, str) and SERVER_TOOL.fullmatch(kind):
        return {**{k: v for k, v in tool.items() if k != "cache_control"}, **mark}
    made = tool.get("custom" if kind == "custom" else "function") or {}
    about = made.get("description")
    text = about if isinstance(about, str) else ""
    if kind == "custom":
        schema, more = custom_schema(made.get("format"))
    else:
        schema, more = object_schema(made.get("parameters"))
    text = "\n\n".join(words for words in (text, more) if words)
    described = {"description": text} if text else {}
    return {"name": names.out(made["name"]), **described, "input_schema": schema, **mark}


def custom_schema(format: Any) -> tuple[Json, str]:
    """A tool that takes free text, as a function with one string; its grammar in words."""
    inner = format.get("grammar") if isinstance(format, dict) else None
    grammar = inner if isinstance(inner, dict) else format if isinstance(format, dict) else {}
    text = grammar.get("definition")
    note = f"The input must follow this grammar:\n{text}" if isinstance(text, str) else ""
    properties = {"input": {"type": "string", "description": "The input of the tool, as text."}}
    return {"type": "object", "properties": properties, "required": ["input"]}, note


ALTERNATIVES: Final = ("anyOf", "oneOf", "allOf")


def object_schema(schema: Any) -> tuple[Json, str]:
    """(an input_schema the API takes, what it cannot say, in words).

    The top level must be an object without anyOf, oneOf or allOf ("input_schema does not
    support ... at the top level", 2026-09): their properties are merged.
    """
    whole = dict(schema) if isinstance(schema, dict) else {}
    branches = [(how, b) for how in ALTERNATIVES for b in branches_of(whole, how)]
    choice = [b for how, b in branches if how != "allOf"]
    properties, required = parts_of(whole)
    for how, branch in branches:
        more, needed = parts_of(branch)
        properties = {**more, **properties}
        required += needed if how == "allOf" else []
    if choice:  # what every alternative needs is needed
        needs = [parts_of(branch)[1] for branch in choice]
        required += [name for name in needs[0] if all(name in n for n in needs)]
    kept = {k: v for k, v in whole.items() if k not in (*ALTERNATIVES, "$ref", "required")}
    names = [name for name in dict.fromkeys(required) if name in properties]
    result = {**kept, "type": "object", "properties": properties}
    note = "The input must fit one of these schemas: " if choice else ""
    shown = json.dumps(choice, ensure_ascii=False)[:2000] if choice else ""
    return ({**result, "required": names} if names else result), note + shown


def branches_of(whole: Json, how: str) -> list[Json]:
    listed = whole.get(how)
    found = [b for b in listed if isinstance(b, dict)] if isinstance(listed, list) else []
    if how == "allOf" and isinstance(whole.get("$ref"), str):
        found.append({"$ref": whole["$ref"]})
    return [resolved(branch, whole) for branch in found]


def resolved(branch: Json, whole: Json) -> Json:
    """A schema, or the one its local $ref points to."""
    ref, value = branch.get("$ref"), whole
    if not isinstance(ref, str) or not ref.startswith("#/"):
        return branch
    for name in ref[2:].split("/"):
        inner = value.get(name.replace("~1", "/").replace("~0", "~"))
        if not isinstance(inner, dict):
            return branch
        value = inner
    return value


def parts_of(schema: Json) -> tuple[Json, list[str]]:
    """Properties and required names, if they are what they must be."""
    properties, required = schema.get("properties"), schema.get("required")
    found = properties if isinstance(properties, dict) else {}
    names = required if isinstance(required, list) else []
    kept = {k: v for k, v in found.items() if isinstance(v, (dict, bool))}
    return kept, [name for name in names if isinstance(name, str)]


# -- the request: output, thinking, sampling -------------------------------------


def set_format(body: Json, chat: Json, history: History, traits: ClaudeTraits) -> None:
    """JSON mode: by schema where the model takes this one, else by instruction."""
    wanted = chat.get("response_format")
    if not isinstance(wanted, dict) or not wants_json(chat):
        return
    holder = wanted.get("json_schema")
    schema = holder.get("schema") if isinstance(holder, dict) else None
    strict = closed_schema(schema) if traits.schema and isinstance(schema, dict) else None
    if strict is not None:
        body["output_config"] = {"format": {"type": "json_schema", "schema": strict}}
        return
    text = "Answer with one valid JSON object and nothing else: no explanation, no code fence."
    if isinstance(schema, dict):
        text += "\nIt must fit this JSON schema:\n" + json.dumps(schema, ensure_ascii=False)
    history.system.append(text_block(text))


# Members of a schema that structured output takes (structured outputs guide, 2026-11).
SCHEMA_MEMBERS: Final = frozenset(
    {"type", "description", "title", "enum", "const", "$ref", "default"}
)
SCHEMA_FORMATS: Final = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid")
)
SCHEMA_TYPES: Final = frozenset(
    ("object", "array", "string", "integer", "number", "boolean", "null")
)


def closed_schema(schema: Json) -> Json | None:
    """A schema as structured output takes it, or None if it cannot be said that way.

    Objects are closed, what is not supported moves into the description; recursion and open
    maps cannot be said.
    """
    if has_recursion(schema):
        return None
    try:
        closed = close(schema)
    except ValueError:
        return None
    return closed if closed.get("type") == "object" or "$ref" in closed else None


def close(schema: Any) -> Json:
    """One level of closed_schema; ValueError if it cannot be said."""
    if not isinstance(schema, dict):
        raise ValueError("not a schema object")
    made = {k: v for k, v in schema.items() if k in SCHEMA_MEMBERS}
    for name in ("$defs", "definitions"):
        if isinstance(schema.get(name), dict):
            made[name] = {k: close(v) for k, v in schema[name].items()}
    for name in ALTERNATIVES:
        if isinstance(schema.get(name), list):
            made["allOf" if name == "allOf" else "anyOf"] = [close(v) for v in schema[name]]
    if not any(name in made for name in ("type", "enum", "const", "$ref", "anyOf", "allOf")):
        raise ValueError("no type")
    kinds = types_of(made)
    if str(schema.get("format")) in SCHEMA_FORMATS:
        made["format"] = schema["format"]
    if "items" in schema:
        made["items"] = close(schema["items"])
    if "object" in kinds or "properties" in schema:
        close_object(made, schema)
    return with_notes(made, schema)


def types_of(schema: Json) -> list[str]:
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if isinstance(kinds, list) and all(isinstance(k, str) and k in SCHEMA_TYPES for k in kinds):
        return kinds
    raise ValueError("no JSON type")


def close_object(made: Json, schema: Json) -> None:
    properties, required = parts_of(schema)
    if not properties and schema.get("additionalProperties", True) is not False:
        raise ValueError("an open map")
    made["properties"] = {name: close(value) for name, value in properties.items()}
    made["required"] = [name for name in required if name in properties]
    made["additionalProperties"] = False


def with_notes(made: Json, schema: Json) -> Json:
    """What had to be left out, as words at the end of the description."""
    known = (*made, *ALTERNATIVES, "additionalProperties", "$schema", "$id", "examples")
    lost = {k: v for k, v in schema.items() if k not in known}
    if not lost:
        return made
    about = made.get("description")
    words = [about] if isinstance(about, str) and about else []
    return {**made, "description": "\n\n".join([*words, json.dumps(lost, ensure_ascii=False)])}


def has_recursion(schema: Json) -> bool:
    """Does a definition hold itself, directly or through others?"""
    tables = (schema.get("$defs"), schema.get("definitions"))
    found = {k: v for table in tables if isinstance(table, dict) for k, v in table.items()}
    edges = {name: refs_in(value) for name, value in found.items()}
    reach = {name: set(names) for name, names in edges.items()}
    for _ in reach:
        for names in reach.values():
            names.update(*(edges.get(n, ()) for n in tuple(names)))
    return "" in refs_in(schema) or any(name in names for name, names in reach.items())


def refs_in(value: object) -> set[str]:
    """The last words of all $refs below a value; "" for the root or another document."""
    if isinstance(value, list):
        return {name for item in value for name in refs_in(item)}
    if not isinstance(value, dict):
        return set()
    names = {name for item in value.values() for name in refs_in(item)}
    ref = value.get("$ref")
    if isinstance(ref, str):
        names.add(ref.rpartition("/")[2] if ref.startswith(("#/$defs/", "#/definitions/")) else "")
    return names


class Wish(NamedTuple):
    """What a chat wants of thinking: None = it does not say."""

    on: bool | None = None
    budget: int = 0  # tokens; 0 = not said
    effort: str = ""
    display: Mapping[str, str] = MappingProxyType({})


def thinking_wish(chat: Json) -> Wish:
    thinking, effort = chat.get("thinking"), chat.get("reasoning_effort")
    effort = effort if isinstance(effort, str) and effort in (*THINKING_BUDGETS, "none") else ""
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    if isinstance(thinking, dict) and isinstance(kind, str):
        if kind in ("disabled", "between_tools"):
            return Wish(False)
        shown = thinking.get("display")
        display = {"display": shown} if shown in ("summarized", "omitted") else {}
        level = "" if effort == "none" else effort
        return Wish(True, natural(thinking.get("budget_tokens")), level, display)
    if not effort:
        return Wish()
    # Newer models hide the text unless asked, and a silent stream looks like a dead one.
    return Wish(effort != "none", 0, effort, {"display": "summarized"})


def set_thinking(body: Json, chat: Json, traits: ClaudeTraits) -> None:
    """`thinking` and the effort, unless something else in the request forbids thinking."""
    wish = thinking_wish(chat)
    forced = body.get("tool_choice", {}).get("type") in ("any", "tool")
    if traits.thinking == "none" or (wish.on is None and not forced):
        return
    if not wish.on or forced or not may_think(body, traits, wish):
        stop_thinking(body, traits, wish)
    elif traits.thinking == "adaptive":
        body["thinking"] = {"type": "adaptive", **wish.display}
        set_effort(body, wish.effort or effort_of(wish.budget), traits)
    else:
        budget = wish.budget or THINKING_BUDGETS.get(wish.effort, THINKING_BUDGETS["medium"])
        budget = max(budget, MIN_BUDGET)
        if budget >= body["max_tokens"]:  # leave room for an answer
            budget = max(MIN_BUDGET, body["max_tokens"] * 3 // 4)
        body["thinking"] = {"type": "enabled", "budget_tokens": budget}


def may_think(body: Json, traits: ClaudeTraits, wish: Wish) -> bool:
    """A budget needs room, an own answer, and the thinking of a tool loop that goes on.

    Adaptive thinking asks for none of this (extended thinking guide, 2026-11).
    """
    if traits.thinking == "adaptive":
        return True
    is_prefill = body["messages"][-1]["role"] == "assistant" and traits.prefill
    return body["max_tokens"] > MIN_BUDGET and not is_prefill and not loses_thought(body)


def loses_thought(body: Json) -> bool:
    """Is the last assistant turn part of a tool loop whose thinking is missing?

    The last turn or the first one of the loop has to begin with thinking ("a final assistant
    message must start with a thinking block", seen 2025-08).
    """
    turns = [turn for turn in body["messages"] if isinstance(turn, dict)]
    last = [at for at, turn in enumerate(turns) if turn.get("role") == "assistant"]
    if not last or "tool_use" not in block_types(turns[last[-1]]):
        return False
    first = last[-1]
    while first >= 2 and block_types(turns[first - 1]) == {"tool_result"}:
        first -= 2
    return not any(starts_with_thought(turns[at]) for at in {first, last[-1]})


def block_types(turn: Json) -> set[str]:
    content = turn.get("content")
    blocks = content if isinstance(content, list) else []
    return {str(block.get("type")) for block in blocks if isinstance(block, dict)}


def starts_with_thought(turn: Json) -> bool:
    content = turn.get("content")
    first = content[0] if isinstance(content, list) and content else None
    return isinstance(first, dict) and first.get("type") in THINKING


def stop_thinking(body: Json, traits: ClaudeTraits, wish: Wish) -> None:
    if traits.off in ("disabled", "between_tools"):
        body["thinking"] = {"type": traits.off}
    effort = "low" if wish.on is False else wish.effort
    if traits.off == "never":
        set_effort(body, effort, traits)


def set_effort(body: Json, effort: str, traits: ClaudeTraits) -> None:
    level = {"minimal": "low", "none": "low"}.get(effort, effort)
    if level == "xhigh" and level not in traits.efforts:
        level = "high"
    if level in traits.efforts:
        body["output_config"] = {**body.get("output_config", {}), "effort": level}


def effort_of(budget: int) -> str:
    """The effort a budget stands for, "" if there is none."""
    if not budget:
        return ""
    return next((name for name, tokens in THINKING_BUDGETS.items() if budget <= tokens), "max")


def set_sampling(body: Json, chat: Json, traits: ClaudeTraits) -> None:
    """temperature, top_p and top_k as far as model and thinking allow them."""
    if traits.sampling == "none":
        return
    thinks = body.get("thinking", {}).get("type") in ("enabled", "adaptive")
    warmth: Any = chat.get("temperature")
    top_p: Any = chat.get("top_p")
    top_k = natural(chat.get("top_k"))
    if is_number(warmth) and not thinks:
        body["temperature"] = min(max(warmth, 0), 1)
    both = traits.sampling == "one" and "temperature" in body
    if is_number(top_p) and not both and (not thinks or LEAST_TOP_P <= top_p <= 1):
        body["top_p"] = min(max(top_p, 0), 1)
    if top_k and not thinks:
        body["top_k"] = top_k


def end_turns(body: Json, traits: ClaudeTraits) -> None:
    """A last assistant turn is a prefill: where there is none, the user asks to go on."""
    turns, last = body["messages"], body["messages"][-1]
    if last["role"] != "assistant":
        return
    has_format = "format" in body.get("output_config", {})
    if not traits.prefill or has_format or "thinking" in body:
        turns.append({"role": "user", "content": [text_block(GO_ON)]})
        return
    last["content"][-1] = {**last["content"][-1], "text": last["content"][-1]["text"].rstrip()}


# -- the request: cache ----------------------------------------------------------


def mark_cache(body: Json, system: list[Json]) -> None:
    """The client's cache marks as far as allowed, or two of our own in a long request."""
    holders = list(markable(body, system))
    marked = [holder for holder in holders if "cache_control" in holder]
    if not marked:
        add_marks(body, system)
        return
    for holder in marked[:-MAX_MARKS]:
        del holder["cache_control"]
    ttls = [holder["cache_control"] for holder in marked[-MAX_MARKS:]]
    for before, mark in itertools.pairwise(ttls):
        if before.get("ttl") != "1h":
            mark.pop("ttl", None)  # a longer time may not follow a shorter one


def markable(body: Json, system: list[Json]) -> Iterator[Json]:
    """Everything that may hold a mark, in the order the API reads it."""
    yield from body.get("tools", ())
    yield from system
    for turn in body["messages"]:
        yield from (block for block in turn["content"] if block["type"] not in THINKING)


def add_marks(body: Json, system: list[Json]) -> None:
    """On what comes first if it is long, and on the newest turn of a long conversation."""
    prefix = body.get("tools", []) + system
    size = sum(size_of(block) for block in prefix)
    if size >= LONG_PREFIX:
        prefix[-1]["cache_control"] = {"type": "ephemeral"}
    turns = body["messages"]
    size += sum(size_of(block) for turn in turns for block in turn["content"])
    user = [turn for turn in turns if turn["role"] == "user"]
    if len(turns) > 1 and size >= LONG_PREFIX:
        user[-1]["content"][-1]["cache_control"] = {"type": "ephemeral"}


def size_of(block: Json) -> int:
    """Characters, roughly; an image or a document counts as 1,000."""
    text = block.get("text")
    if isinstance(text, str):
        return len(text)
    return 1000 if "source" in block else len(json.dumps(block))


# -- native requests -------------------------------------------------------------


def own_thinking(body: Json, origin: str) -> Json | None:
    """Edits for the body of a Messages client that goes to `origin` as it is, or None.

    Sealed thinking goes back unsealed to the provider it came from; that of others, and what
    nobody signed, is dropped, and thinking with a budget is then left out for this call if its
    tool loop has lost its own. Only blocks with a seal are touched.
    """
    turns = body.get("messages")
    if not isinstance(turns, list) or not any(is_sealed(b) for t in turns for b in blocks_of(t)):
        return None
    made = [unsealed_turn(turn, origin) for turn in turns]
    edits: Json = {"messages": [turn for turn in made if turn is not None]}
    thinking = body.get("thinking")
    is_budget = isinstance(thinking, dict) and thinking.get("type") == "enabled"
    if is_budget and loses_thought(edits):
        edits["thinking"] = DROP
    return edits


def blocks_of(turn: Any) -> list[Json]:
    content = turn.get("content") if isinstance(turn, dict) else None
    return [b for b in content if isinstance(b, dict)] if isinstance(content, list) else []


def opaque_member(block: Json) -> str:
    return "signature" if block.get("type") == "thinking" else "data"


def is_sealed(block: Json) -> bool:
    value = block.get(opaque_member(block))
    return block.get("type") in THINKING and isinstance(value, str) and value.startswith(SEAL)


def unsealed_turn(turn: Any, origin: str) -> Json | None:
    """The turn without seals; None if nothing is left of it."""
    if not any(is_sealed(block) for block in blocks_of(turn)):
        return cast("Json", turn)
    content: list[Any] = []
    for block in turn["content"]:
        if not isinstance(block, dict) or not is_sealed(block):
            content.append(block)
            continue
        name = opaque_member(block)
        came_from, value = unseal(block[name])
        if came_from == origin and value:
            content.append({**block, name: value})
    return {**turn, "content": content} if content else None


def only_content_messages(block: bytes) -> bool:
    """Whether a block of Messages events surely holds no error, start, finish or usage.

    The names may stand in a text as well: then the block is looked at for nothing.
    """
    return (
        b"message_delta" not in block
        and b'"tool_use"' not in block
        and b"input_json_delta" not in block
        and block.count(b"data: {") == block.count(b"}\n\n")
        and block.count(b"{") == block.count(b"}")
        and b'"error"' not in block
        and b"message_st" not in block  # message_start, message_stop
        and b"event: error" not in block
    )


def messages_tokens(event: Any) -> Tokens | None:
    """Token counts in message_start, message_delta or a whole answer; 0 = it does not say."""
    if not isinstance(event, dict):
        return None
    holder = event.get("message") if event.get("type") == "message_start" else event
    usage = holder.get("usage") if isinstance(holder, dict) else None
    if not isinstance(usage, dict):
        return None
    count = usage_from_messages(usage)
    return Tokens(count["prompt_tokens"], count["completion_tokens"])


# -- the answer ------------------------------------------------------------------

FINISHES: Final = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "pause_turn": "stop",  # the model wants the turn sent again; a chat has no word for it
    "refusal": "content_filter",
}
ERROR_STATUS: Final = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
INPUT_COUNTS: Final = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


def usage_from_messages(usage: Json) -> Json:
    """Chat usage from Messages usage, whose input_tokens leave out what was cached."""
    fresh, read, written = (natural(usage.get(name)) for name in INPUT_COUNTS)
    prompt, completion = fresh + read + written, natural(usage.get("output_tokens"))
    result: Json = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": read, "cache_creation_tokens": written},
    }
    details = usage.get("output_tokens_details")
    thought = details.get("thinking_tokens") if isinstance(details, dict) else None
    if isinstance(thought, int):
        result["completion_tokens_details"] = {"reasoning_tokens": natural(thought)}
    return result


def error_from_messages(event: Json) -> Json:
    """An error event or body in the chat shape, its type also as an HTTP status."""
    error = event.get("error")
    error = error if isinstance(error, dict) else {"message": error}
    kind, message = error.get("type"), error.get("message")
    kind = kind if isinstance(kind, str) else "api_error"
    text = message if isinstance(message, str) else kind
    return {"error": {"message": text, "type": kind, "code": ERROR_STATUS.get(kind, 502)}}


@dataclass
class OpenBlock:
    """A content block that is being received."""

    kind: str
    start: Json
    call: int = -1  # index of the tool call
    text: str = ""  # thinking, or arguments
    signature: str = ""
    begins: int = 0  # where its text begins in the content
    citations: list[Any] = field(default_factory=list)


class MessagesReader:
    """Events of a Messages stream to chunks of a canonical chat.

    Thinking goes out as reasoning_content while it comes; its reasoning_details piece follows
    whole, with the signature, when the block ends. `chat` is the request the answer is for: it
    tells which tools take free text and how they are spelled. `finished` is set by a stop
    reason: a stream without one was cut off.
    """

    def __init__(self, origin: str = "anthropic", chat: Json | None = None, created: int = 0):
        self.origin, self.created = origin, created
        self.names = ToolNames(chat or {})
        self.finished = False
        self.id, self.model = "", ""
        self.usage: Json = {}
        self.blocks: dict[int, OpenBlock] = {}
        self.calls = 0
        self.written = 0  # characters of content so far
        self.reasoned = False  # is there reasoning_content already?
        self.gap = False  # has something else come since the last text?

    def feed(self, event: Json) -> list[Json]:
        """Chunks for one event; pings and unknown events give none."""
        kind = event.get("type") if isinstance(event, dict) else None
        if kind == "error" or (kind is None and isinstance(event, dict) and event.get("error")):
            return [error_from_messages(event)]
        read = {
            "message_start": self.on_start,
            "content_block_start": self.on_block,
            "content_block_delta": self.on_delta,
            "content_block_stop": self.on_block_end,
            "message_delta": self.on_finish,
        }.get(str(kind))
        return read(event) if read else []

    def finish(self) -> list[Json]:
        """What is held when the stream has ended: the ends of blocks that were never closed."""
        if not self.finished:
            return []
        return [chunk for index in list(self.blocks) for chunk in self.end(index)]

    def chunk(self, delta: Json, **choice: Any) -> list[Json]:
        return [self.frame([{"index": 0, "delta": delta, "finish_reason": None, **choice}])]

    def frame(self, choices: list[Json], **more: Any) -> Json:
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created}
        return {**head, "model": self.model, "choices": choices, **more}

    # Events

    def on_start(self, event: Json) -> list[Json]:
        message = event.get("message")
        message = message if isinstance(message, dict) else {}
        self.id, self.model = (str(message.get(name) or "") for name in ("id", "model"))
        self.add_usage(message.get("usage"))
        return self.chunk({"role": "assistant"})

    def on_block(self, event: Json) -> list[Json]:
        start = event.get("content_block")
        start = start if isinstance(start, dict) else {}
        block = OpenBlock(str(start.get("type")), start, begins=self.written)
        index = index_of(event)
        chunks = self.end(index)  # a stream that leaves out the end of the one before
        self.blocks[index] = block
        if block.kind == "text":
            cited = start.get("citations")
            block.citations = list(cited) if isinstance(cited, list) else []
            return chunks + self.on_text(start.get("text"))
        self.gap = True
        if block.kind == "thinking":
            block.signature = str(start.get("signature") or "")
            return chunks + self.on_thought(block, start.get("thinking"))
        if block.kind == "tool_use":
            return chunks + self.on_call(block)
        return chunks + self.on_server_block(block)

    def on_delta(self, event: Json) -> list[Json]:
        block, delta = self.blocks.get(index_of(event)), event.get("delta")
        if block is None or not isinstance(delta, dict):
            return []
        kind = delta.get("type")
        if kind == "text_delta":
            return self.on_text(delta.get("text"))
        if kind == "thinking_delta":
            return self.on_thought(block, delta.get("thinking"))
        if kind == "signature_delta":
            block.signature += str(delta.get("signature") or "")
        elif kind == "citations_delta":
            block.citations.append(delta.get("citation"))
        elif kind == "input_json_delta":
            return self.on_arguments(block, delta.get("partial_json"))
        elif kind == "compaction_delta":
            return self.on_thought(block, delta.get("content"))
        return []

    def on_block_end(self, event: Json) -> list[Json]:
        return self.end(index_of(event))

    def on_finish(self, event: Json) -> list[Json]:
        delta = event.get("delta")
        delta = delta if isinstance(delta, dict) else {}
        chunks: list[Json] = []
        reason = delta.get("stop_reason")
        if isinstance(reason, str) and reason and not self.finished:
            self.finished = True
            if reason == "refusal":
                chunks += self.chunk({"refusal": refusal_text(delta.get("stop_details"))})
            finish = FINISHES.get(reason, "stop")
            if reason == "end_turn" and self.calls:  # copies of the API are careless here
                finish = "tool_calls"
            stop = delta.get("stop_sequence")
            more = {"stop_sequence": stop} if isinstance(stop, str) else {}
            chunks += self.chunk({}, finish_reason=finish, **more)
        self.add_usage(event.get("usage"))
        if self.usage:
            chunks.append(self.frame([], usage=usage_from_messages(self.usage)))
        return chunks

    # Blocks

    def on_text(self, text: object) -> list[Json]:
        if not isinstance(text, str) or not text:
            return []
        if self.gap and self.written:
            text = "\n\n" + text  # a call or a search stood between two texts
        self.gap = False
        self.written += len(text)
        return self.chunk({"content": text})

    def on_thought(self, block: OpenBlock, text: object) -> list[Json]:
        if not isinstance(text, str) or not text:
            return []
        is_first = not block.text
        block.text += text
        return self.on_reasoning(text, is_first)

    def on_reasoning(self, text: object, is_first: bool) -> list[Json]:
        if not isinstance(text, str) or not text:
            return []
        if is_first and self.reasoned:
            text = "\n\n" + text
        self.reasoned = True
        return self.chunk({"reasoning_content": text})

    def on_call(self, block: OpenBlock) -> list[Json]:
        block.call, self.calls = self.calls, self.calls + 1
        name = self.names.back(str(block.start.get("name") or ""))
        block.start = {**block.start, "name": name}
        if name in self.names.custom:
            return []  # its text is inside JSON: it goes out when that is complete
        function = {"name": name, "arguments": ""}
        return self.call_chunk(block, {"type": "function", "function": function})

    def call_chunk(self, block: OpenBlock, call: Json) -> list[Json]:
        id = str(block.start.get("id") or f"call_{block.call}")
        return self.chunk({"tool_calls": [{"index": block.call, "id": id, **call}]})

    def on_arguments(self, block: OpenBlock, text: object) -> list[Json]:
        if block.call < 0 or not isinstance(text, str) or not text:
            return []
        block.text += text
        if block.start["name"] in self.names.custom:
            return []
        return self.arguments_chunk(block, text)

    def arguments_chunk(self, block: OpenBlock, text: str) -> list[Json]:
        function = {"arguments": text}
        return self.chunk({"tool_calls": [{"index": block.call, "function": function}]})

    def on_server_block(self, block: OpenBlock) -> list[Json]:
        """Blocks without an equal in chat: what they say is kept as readable reasoning."""
        data = block.start.get("data")
        if block.kind == "redacted_thinking" and isinstance(data, str):
            return self.detail({"type": "reasoning.encrypted", "data": data})
        if block.kind.endswith("_tool_result") or block.kind == "compaction":
            return self.on_reasoning("\n".join(texts_in(block.start.get("content"))), True)
        return []

    def detail(self, piece: Json) -> list[Json]:
        return self.chunk({"reasoning_details": [{**piece, "origin": self.origin}]})

    def end(self, index: int) -> list[Json]:
        block = self.blocks.pop(index, None)
        if block is None:
            return []
        if block.kind == "thinking":
            piece = {"type": "reasoning.text", "text": block.text, "signature": block.signature}
            if not block.signature:
                del piece["signature"]
            return self.detail(piece) if block.text or block.signature else []
        if block.kind == "text":
            return self.end_text(block)
        return self.end_call(block) if block.call >= 0 else []

    def end_text(self, block: OpenBlock) -> list[Json]:
        spans = (url_citation(c, block.begins, self.written) for c in block.citations)
        found = [span for span in spans if span]
        return self.chunk({"annotations": found}) if found else []

    def end_call(self, block: OpenBlock) -> list[Json]:
        """A block without input sends none: its arguments are {}."""
        whole = block.start.get("input")
        given = block.text or dump_json(whole if isinstance(whole, dict) else {}).decode()
        name = block.start["name"]
        if name in self.names.custom:
            value = parse_arguments(given).get("input")
            text = value if isinstance(value, str) else given
            return self.call_chunk(
                block, {"type": "custom", "custom": {"name": name, "input": text}}
            )
        return [] if block.text else self.arguments_chunk(block, given)

    def add_usage(self, usage: object) -> None:
        """Later counts win, but a copy of the API that ends with 0 does not undo the input."""
        for name, value in usage.items() if isinstance(usage, dict) else ():
            if value is not None and (value or name not in INPUT_COUNTS):
                self.usage[name] = value


def index_of(event: Json) -> int:
    index = event.get("index")
    return index if isinstance(index, int) else 0


def refusal_text(details: object) -> str:
    details = details if isinstance(details, dict) else {}
    told = (details.get(name) for name in ("explanation", "category"))
    text = next((t for t in told if isinstance(t, str) and t), "")
    return text or "The model declined to answer."


def texts_in(value: object) -> Iterator[str]:
    """The texts a server tool gave back: of advisors, MCP servers and programs."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, dict):
                yield from texts_in(item)
    elif isinstance(value, dict):
        told = (value.get(name) for name in ("text", "stdout", "stderr"))
        yield from (text for text in told if isinstance(text, str) and text)


def url_citation(citation: object, start: int, end: int) -> Json | None:
    """A chat annotation for a web citation; citations of documents have no equal."""
    if not isinstance(citation, dict) or not isinstance(citation.get("url"), str):
        return None
    span = {"start_index": start, "end_index": end, "url": citation["url"]}
    title = citation.get("title")
    cited = {**span, "title": title if isinstance(title, str) else citation["url"]}
    return {"type": "url_citation", "url_citation": cited}


def messages_reply_to_chat(
    reply: Json, origin: str = "anthropic", chat: Json | None = None, created: int = 0
) -> Json:
    """The canonical reply for a whole Messages answer; an error body gives {"error": ...}."""
    if reply.get("type") == "error" or reply.get("error"):
        return error_from_messages(reply)
    reader = MessagesReader(origin, chat, created)
    chunks = [chunk for event in events_of(reply) for chunk in reader.feed(event)]
    return gathered_reply([*chunks, *reader.finish()])


def events_of(reply: Json) -> Iterator[Json]:
    """A whole answer as the events it would have been streamed in."""
    yield {"type": "message_start", "message": reply}
    content = reply.get("content")
    for index, block in enumerate(content if isinstance(content, list) else ()):
        yield {"type": "content_block_start", "index": index, "content_block": block}
        yield {"type": "content_block_stop", "index": index}
    reason = reply.get("stop_reason") or "end_turn"
    yield {"type": "message_delta", "delta": {**reply, "stop_reason": reason}}


# =============================================================================
# 15. Responses in
# =============================================================================

JSON_TEXT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

# A client speaks OpenAI Responses; the hub speaks chat. Wire facts: recorded traffic of OpenAI,
# DeepSeek and Bedrock Mantle, and the openai SDK 3.54 (seen 2026-11). Codex CLI 0.159 builds its
# turn from response.output_item.done alone (public protocol notes, 2026-10).

RESPONSES_FIELDS: Mapping[str, FieldRule] = {
    "model": FieldRule("a string", is_string),
    "instructions": FieldRule("a string", is_string),
    "stream": FieldRule("true or false", is_boolean),
    "stream_options": FieldRule("an object", is_object),
    "temperature": FieldRule("a number", is_number),
    "top_p": FieldRule("a number", is_number),
    "top_logprobs": FieldRule("an integer", is_integer),
    "max_output_tokens": FieldRule("an integer of at least 1", is_natural),
    "max_tool_calls": FieldRule("an integer", is_integer),
    "tools": FieldRule("a list of tools", is_list),
    "tool_choice": FieldRule("a string or an object", is_string_or_object),
    "parallel_tool_calls": FieldRule("true or false", is_boolean),
    "text": FieldRule("an object", is_object),
    "reasoning": FieldRule("an object", is_object),
    "metadata": FieldRule("an object", is_object),
    "include": FieldRule("a list of strings", is_strings),
    "store": FieldRule("true or false", is_boolean),
    "background": FieldRule("true or false", is_boolean),
    "previous_response_id": FieldRule("a string", is_string),
    "truncation": FieldRule("a string", is_string),
    "service_tier": FieldRule("a string", is_string),
    "prompt_cache_key": FieldRule("a string", is_string),
    "safety_identifier": FieldRule("a string", is_string),
    "user": FieldRule("a string", is_string),
}

# What only the service that keeps files, jobs and prompts could do: (field, why not).
RESPONSES_REFUSED = (
    ("background", "answers are not made in the background here; use stream instead"),
    ("conversation", "conversations are not kept here; use previous_response_id or send the items"),
    ("prompt", "prompt templates are kept by OpenAI alone; send instructions and input"),
    ("top_logprobs", "log probabilities are not available here"),
)

# Request field -> chat field, for values that are the same on both sides.
RESPONSES_SAME: Mapping[str, str] = {
    "model": "model",
    "stream": "stream",
    "temperature": "temperature",
    "top_p": "top_p",
    "max_output_tokens": "max_completion_tokens",
    "safety_identifier": "user",
    "user": "user",
    "prompt_cache_key": "prompt_cache_key",
    "service_tier": "service_tier",
}

NO_ITEMS = "a string or a list of at least one item"
NO_PARAMETERS: Json = {"type": "object", "properties": {}}
FILE_KINDS: Mapping[str, str] = {
    "pdf": "application/pdf",
    "txt": "text/plain",
    "md": "text/markdown",
    "csv": "text/csv",
    "json": "application/json",
    "html": "text/html",
}


def validate_responses(body: Mapping[str, Any]) -> None:
    """Raise BadRequest, naming the field, for what is malformed or cannot be served at all.

    Items, tools and tool_choice are checked by `responses_to_chat` as it reads them.
    """
    check_fields(body, RESPONSES_FIELDS)
    for name, why in RESPONSES_REFUSED:
        if body.get(name):
            raise BadRequest(f"{name} is not supported: {why}", param=name)


def responses_to_chat(body: Mapping[str, Any], earlier: Sequence[Json] = ()) -> Json:
    """The chat body for a Responses body; `earlier` are the items that previous_response_id means.

    Kept: input and instructions, function, custom, namespace and client-run tools, sampling,
    limits, text.format and text.verbosity, reasoning.effort, identity and cache fields.
    Tolerated without effect on the model: store, include, metadata (chat at OpenAI refuses it
    without store), truncation, max_tool_calls, client_metadata, stream_options,
    reasoning.summary, unknown fields. Refused: RESPONSES_REFUSED.
    Tools that nobody here can run are left out; `plan_tools(body, earlier).unserved` names them.
    Their calls in the history become text where they hold results (TOOL_NOTES), else they go
    (TOOL_SILENT).
    Raises BadRequest with the path of what is wrong.
    """
    validate_responses(body)
    plan = plan_tools(body, earlier)
    history = ItemHistory(plan)
    if body.get("instructions"):
        history.say("system", body["instructions"])
    for where, item in all_items(body, earlier):
        read_item(history, item, where)
    settings = {**body, **history.updates}
    chat: Json = {"messages": history.close()}
    chat |= {to: body[name] for name, to in RESPONSES_SAME.items() if body.get(name) is not None}
    chat |= chat_text_options(settings.get("text") or {})
    effort = (settings.get("reasoning") or {}).get("effort")
    chat |= {"reasoning_effort": effort} if isinstance(effort, str) else {}
    chat |= {"stream_options": {"include_usage": True}} if body.get("stream") else {}
    chat |= chat_tool_options(body, plan)
    if not chat["messages"]:
        raise invalid("input", NO_ITEMS, body.get("input"))
    return chat


def chat_text_options(text: Json) -> Json:
    """`text` as response_format and verbosity."""
    verbosity, form = text.get("verbosity"), text.get("format")
    options: Json = {"verbosity": verbosity} if isinstance(verbosity, str) else {}
    if form is None:
        return options
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "json_schema":
        names = ("name", "description", "schema", "strict")
        if not isinstance(form.get("schema"), dict):
            raise invalid("text.format.schema", "an object", form.get("schema"))
        schema = {"name": "answer"} | {n: form[n] for n in names if form.get(n) is not None}
        options["response_format"] = {"type": kind, "json_schema": schema}
    elif kind == "json_object":
        options["response_format"] = {"type": kind}
    elif kind != "text":
        raise invalid("text.format.type", "text, json_object or json_schema", kind)
    return options


def items_of(body: Mapping[str, Any]) -> list[Json]:
    """`input` as a list of items, for reading it and for the store."""
    given = body.get("input")
    if isinstance(given, str):
        content = [{"type": "input_text", "text": given}]
        return [{"type": "message", "role": "user", "content": content}]
    if given is None:
        return []
    if not isinstance(given, list):
        raise invalid("input", NO_ITEMS, given)
    for at, item in enumerate(given):
        if not isinstance(item, dict):
            raise invalid(f"input[{at}]", "an object with a type", item)
    return given


def all_items(body: Mapping[str, Any], earlier: Sequence[Json]) -> Iterator[tuple[str, Json]]:
    """(path, item), oldest first. A reference to an item that is there anyway is skipped."""
    items = items_of(body)
    known = [item.get("id") for item in (*earlier, *items) if not is_reference(item)]
    yield from ((f"previous_response_id[{at}]", item) for at, item in enumerate(earlier))
    for at, item in enumerate(items):
        if not is_reference(item):
            yield f"input[{at}]", item
        elif item["id"] not in known:
            message = f"input[{at}].id refers to an item that is not kept here: send the item"
            raise BadRequest(message, param=f"input[{at}].id")


def is_reference(item: Json) -> bool:
    plain = item.get("type") is None and item.get("role") is None
    return (plain or item.get("type") == "item_reference") and isinstance(item.get("id"), str)


# ----- tools -----


class ToolName(NamedTuple):
    """A tool as the client calls it. `kind` is its type, "" for a type nobody here can run."""

    kind: str
    name: str
    namespace: str = ""


@dataclass(frozen=True)
class TypedTool:
    """A tool type without a schema that the client itself runs, offered as a function.

    `member` of its call items holds the arguments together with `fixed`.
    """

    kind: str
    item: str  # type of its call items
    member: str
    description: str
    parameters: Json
    fixed: Json = field(default_factory=dict)
    extra: Json = field(default_factory=dict)  # other members of its call items


@dataclass(frozen=True)
class ToolPlan:
    """The tools of one request as chat tools, and the way back to the client's names."""

    tools: tuple[Json, ...] = ()
    names: Mapping[str, ToolName] = field(default_factory=dict)  # chat name -> client's name
    unserved: tuple[str, ...] = ()  # types of tools left out, each once

    def chat_name(self, tool: ToolName) -> str:
        """The chat name of a tool, offered now or only in an earlier turn."""
        return next((name for name, known in self.names.items() if known == tool), flat_name(tool))

    def client_name(self, name: str) -> ToolName:
        """What the model called. Models leave the namespace away at times; one match is enough."""
        if known := self.names.get(name):
            return known
        bare = [tool for tool in self.names.values() if tool.namespace and tool.name == name]
        return bare[0] if len(bare) == 1 else ToolName("function", name)


STRINGS: Json = {"type": "array", "items": {"type": "string"}}
TYPED_TOOLS: Mapping[str, TypedTool] = {
    row.kind: row
    for row in (
        TypedTool(
            "local_shell",
            "local_shell_call",
            "action",
            "Run a command on the user's computer and get its output.",
            {
                "type": "object",
                "properties": {
                    "command": {**STRINGS, "description": "The program and its arguments."},
                    "working_directory": {"type": "string"},
                    "timeout_ms": {"type": "integer"},
                },
                "required": ["command"],
            },
            fixed={"type": "exec", "env": {}},
        ),
        TypedTool(
            "shell",
            "shell_call",
            "action",
            "Run shell commands on the user's computer and get their output.",
            {
                "type": "object",
                "properties": {
                    "commands": {**STRINGS, "description": "Shell commands, run in this order."},
                    "timeout_ms": {"type": "integer"},
                    "max_output_length": {"type": "integer"},
                },
                "required": ["commands"],
            },
        ),
        TypedTool(
            "apply_patch",
            "apply_patch_call",
            "operation",
            "Create, update or delete one file; `diff` is a V4A diff, not needed for delete_file.",
            {
                "type": "object",
                "properties": {
                    "type": {"enum": ["create_file", "update_file", "delete_file"]},
                    "path": {"type": "string"},
                    "diff": {"type": "string"},
                },
                "required": ["type", "path"],
            },
        ),
        TypedTool(
            "tool_search",
            "tool_search_call",
            "arguments",
            "Find further tools and make them available.",
            {"type": "object", "properties": {"query": {"type": "string"}}},
            extra={"execution": "client"},
        ),
    )
}
TYPED_ITEMS: Mapping[str, TypedTool] = {row.item: row for row in TYPED_TOOLS.values()}
CUSTOM_PARAMETERS: Json = {
    "type": "object",
    "properties": {"input": {"type": "string", "description": "The whole input of the tool."}},
    "required": ["input"],
    "additionalProperties": False,
}
NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]")
MAX_NAME = 64


def plan_tools(body: Mapping[str, Any], earlier: Sequence[Json] = ()) -> ToolPlan:
    """All tools of `tools` and of the items that bring some; a repeated one takes the newest form.

    Items bring tools in Codex's lite mode (additional_tools) and after a tool search.
    """
    found: dict[ToolName, Json | None] = {}
    for where, tools in tool_lists(body, earlier):
        for at, tool in enumerate(tools):
            found.update(read_tool(tool, f"{where}[{at}]"))
    served = [(tool, made) for tool, made in found.items() if made is not None]
    names: dict[str, ToolName] = {}
    chat_tools = []
    for tool, made in served:
        name = unused_name(flat_name(tool), names)
        names[name] = tool
        chat_tools.append({"type": "function", "function": {"name": name, **made}})
    unserved = tuple(tool.name for tool, made in found.items() if made is None)
    return ToolPlan(tuple(chat_tools), names, unserved)


def tool_lists(body: Mapping[str, Any], earlier: Sequence[Json]) -> Iterator[tuple[str, list[Any]]]:
    tools = body.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise invalid("tools", "a list of tools", tools)
    yield "tools", tools or []
    for where, item in all_items(body, earlier):
        if item.get("type") in ("additional_tools", "tool_search_output"):
            given = item.get("tools")
            if not isinstance(given, list):
                raise invalid(f"{where}.tools", "a list of tools", given)
            yield f"{where}.tools", given


def read_tool(tool: Any, where: str, namespace: str = "") -> Iterator[tuple[ToolName, Json | None]]:
    """(name, description and parameters) of one tool; None for a type nobody here can run."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    if not isinstance(kind, str):
        raise invalid(where, "an object with a type", tool)
    if kind == "namespace" and not namespace:
        yield from read_namespace(tool, where)
    elif kind == "function":
        inner = tool.get("function")  # the nested shape of chat, sent by mistake
        yield read_function(inner if isinstance(inner, dict) else tool, where, namespace)
    elif kind == "custom":
        name = required_text(tool, "name", where)
        made = {"description": custom_description(tool), "parameters": CUSTOM_PARAMETERS}
        yield ToolName("custom", name, namespace), made
    elif kind in TYPED_TOOLS and client_runs(tool, kind):
        yield ToolName(kind, kind), typed_function(TYPED_TOOLS[kind], tool)
    else:
        yield ToolName("", kind), None


def read_namespace(tool: Json, where: str) -> Iterator[tuple[ToolName, Json | None]]:
    name, tools = required_text(tool, "name", where), tool.get("tools")
    if not isinstance(tools, list):
        raise invalid(f"{where}.tools", "a list of tools", tools)
    for at, inner in enumerate(tools):
        yield from read_tool(inner, f"{where}.tools[{at}]", name)


def read_function(tool: Json, where: str, namespace: str) -> tuple[ToolName, Json]:
    name, parameters = required_text(tool, "name", where), tool.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise invalid(f"{where}.parameters", "an object", parameters)
    made: Json = {"parameters": parameters or NO_PARAMETERS}
    if isinstance(tool.get("description"), str):
        made["description"] = tool["description"]
    if isinstance(tool.get("strict"), bool):
        made["strict"] = tool["strict"]
    return ToolName("function", name, namespace), made


def custom_description(tool: Json) -> str:
    """The tool's description, with the grammar its input must follow."""
    text, form = tool.get("description"), tool.get("format")
    text = text if isinstance(text, str) else ""
    if not isinstance(form, dict) or not isinstance(form.get("definition"), str):
        return text
    head = f"The input must follow this {form.get('syntax') or 'lark'} grammar:"
    return f"{text}\n\n{head}\n{form['definition']}".lstrip()


def client_runs(tool: Json, kind: str) -> bool:
    """Does the client run this typed tool? Hosted containers and searches are OpenAI's."""
    if kind == "tool_search":
        return tool.get("execution") == "client"
    place = tool.get("environment")
    return not isinstance(place, dict) or place.get("type") == "local"


def typed_function(row: TypedTool, tool: Json) -> Json:
    text, parameters = tool.get("description"), tool.get("parameters")
    return {
        "description": text if isinstance(text, str) and text else row.description,
        "parameters": parameters if isinstance(parameters, dict) else row.parameters,
    }


def flat_name(tool: ToolName) -> str:
    """A name that every provider takes: A-Z a-z 0-9 _ -, at most 64 characters."""
    whole = f"{tool.namespace.rstrip('_')}__{tool.name}" if tool.namespace else tool.name
    name = NOT_IN_NAMES.sub("_", whole)
    if len(name) <= MAX_NAME:
        return name
    mark = zlib.crc32(whole.encode("utf-8", "replace"))
    return f"{name[: MAX_NAME - 9]}_{mark:08x}"


def unused_name(name: str, taken: Mapping[str, object]) -> str:
    for n in itertools.count(2):
        if name not in taken:
            break
        name = f"{name[: MAX_NAME - 4].rstrip('0123456789')}{n}"
    return name


def required_text(value: Json, name: str, where: str) -> str:
    text = value.get(name)
    if not isinstance(text, str) or not text:
        raise invalid(f"{where}.{name}", "a string, and not empty", text)
    return text


def chat_tool_options(body: Mapping[str, Any], plan: ToolPlan) -> Json:
    """tools, tool_choice and parallel_tool_calls, which providers refuse without tools."""
    choice, names = choose_tools(body.get("tool_choice"), plan)
    tools = [tool for tool in plan.tools if tool["function"]["name"] in names]
    if not tools:
        if choice == "required":
            raise no_such_tool("tool_choice requires a call", plan)
        return {}
    parallel = body.get("parallel_tool_calls")
    return {
        "tools": tools,
        **({"tool_choice": choice} if choice is not None else {}),
        **({"parallel_tool_calls": parallel} if parallel is not None else {}),
    }


def choose_tools(choice: Any, plan: ToolPlan) -> tuple[str | Json | None, Iterable[str]]:
    """(chat's tool_choice, names of the tools on offer) for a Responses tool_choice."""
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind is None and not isinstance(choice, dict):
        return None, plan.names
    if kind in ("auto", "none", "required"):
        return str(kind), plan.names
    if not isinstance(choice, dict) or not isinstance(kind, str):
        raise invalid("tool_choice", "auto, none, required or an object with a type", choice)
    if kind == "allowed_tools":
        return allowed_tools(choice, plan)
    names = matching_tools(choice, plan)
    if not names:
        raise no_such_tool(f"tool_choice asks for {choice.get('name') or kind}", plan)
    if len(names) > 1:
        return "required", names
    return {"type": "function", "function": {"name": names[0]}}, plan.names


def allowed_tools(choice: Json, plan: ToolPlan) -> tuple[str, Iterable[str]]:
    """Chat providers know no list of allowed tools: the others are not offered at all."""
    mode, allowed = choice.get("mode") or "auto", choice.get("tools")
    if mode not in ("auto", "required"):
        raise invalid("tool_choice.mode", "auto or required", mode)
    if not isinstance(allowed, list):
        raise invalid("tool_choice.tools", "a list of tools", allowed)
    for at, tool in enumerate(allowed):
        if not is_typed_object(tool):
            raise invalid(f"tool_choice.tools[{at}]", "an object with a type", tool)
    return mode, {name for tool in allowed for name in matching_tools(tool, plan)}


def matching_tools(wanted: Json, plan: ToolPlan) -> list[str]:
    """Chat names of the tools that {type, name?, namespace?} means."""
    kind, name, namespace = wanted["type"], wanted.get("name"), wanted.get("namespace")
    if name is None and isinstance(wanted.get("function"), dict):
        name = wanted["function"].get("name")
    if kind == "namespace":
        return [flat for flat, tool in plan.names.items() if tool.namespace == name]
    return [
        flat
        for flat, tool in plan.names.items()
        if tool.kind == kind
        and (name in (tool.name, flat) or kind in TYPED_TOOLS)
        and namespace in (None, "", tool.namespace)
    ]


def no_such_tool(what: str, plan: ToolPlan) -> BadRequest:
    left = f" ({', '.join(plan.unserved)} cannot be run here)" if plan.unserved else ""
    message = f"{what}, but no such tool can be offered to the model{left}"
    return BadRequest(message, param="tool_choice")


# ----- items -----

# Results of tools that only OpenAI runs: the members a model can still use, as text.
TOOL_NOTES: Mapping[str, tuple[str, ...]] = {
    "file_search_call": ("queries", "results"),
    "code_interpreter_call": ("code", "outputs"),
    "image_generation_call": ("revised_prompt",),
    "mcp_call": ("server_label", "name", "arguments", "output", "error"),
    "computer_call": ("action", "actions"),
    "program": ("code",),
    "program_output": ("result", "output"),
}
# Steps of such tools that say nothing the messages beside them do not say.
TOOL_SILENT = frozenset(
    ("web_search_call", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response")
)
MAX_NOTE = 8_000
COMPACTED = "[Earlier turns were compacted by OpenAI; what they held cannot be read here.]"
SPEAKERS = ("user", "system", "developer", "assistant")


class ItemHistory:
    """Chat messages from items, in order.

    What the assistant said, thought and called between two turns of others is ONE message.
    """

    def __init__(self, plan: ToolPlan) -> None:
        self.plan = plan
        self.updates: Json = {}  # settings that items change
        self._messages: list[Json] = []
        self._texts: list[str] | None = None  # of the open assistant message
        self._thoughts: list[str] = []
        self._pieces: list[Json] = []
        self._calls: list[Json] = []
        self._extras: Json = {}  # call id -> extra_content

    def say(self, role: str, content: str | list[Json]) -> None:
        self.close()
        self._messages.append({"role": role, "content": content})

    def answer(self, call_id: str, content: str | list[Json], is_error: bool = False) -> None:
        self.close()
        message: Json = {"role": "tool", "tool_call_id": call_id, "content": content}
        self._messages.append({**message, "is_error": True} if is_error else message)

    def add_text(self, text: str) -> None:
        self._texts = self._texts or []
        if text:
            self._texts.append(text)

    def add_call(self, call_id: str, tool: ToolName, arguments: str) -> None:
        self.add_text("")
        function = {"name": self.plan.chat_name(tool), "arguments": arguments}
        self._calls.append({"id": call_id, "type": "function", "function": function})

    def add_thought(self, text: str, pieces: Sequence[Json]) -> None:
        self.add_text("")
        self._thoughts += [text] if text else []
        self._pieces += pieces

    def add_extra(self, call_id: str, extra: object) -> None:
        """What a provider wants back with a call (Gemini's thought signature)."""
        self._extras[call_id] = extra

    def close(self) -> list[Json]:
        """All messages; an open assistant message is finished first."""
        texts, self._texts = self._texts, None
        if texts is None:
            return self._messages
        calls = [self._with_extra(call) for call in self._calls]
        text = "\n\n".join(texts)
        message: Json = {"role": "assistant", "content": text or (None if calls else "")}
        message |= {"reasoning_content": "\n\n".join(self._thoughts)} if self._thoughts else {}
        message |= {"reasoning_details": self._pieces} if self._pieces else {}
        message |= {"tool_calls": calls} if calls else {}
        self._messages.append(message)
        self._thoughts, self._pieces, self._calls = [], [], []
        return self._messages

    def _with_extra(self, call: Json) -> Json:
        extra = self._extras.get(call["id"])
        return {**call, "extra_content": extra} if extra is not None else call


def read_item(history: ItemHistory, item: Json, where: str) -> None:
    """Add one item to the history; BadRequest for a type that has no place in a chat."""
    kind = item.get("type") or ("message" if "role" in item else None)
    if not isinstance(kind, str):
        raise invalid(f"{where}.type", "a string", kind)
    if reader := ITEM_READERS.get(kind):
        reader(history, item, where)
    elif kind in TOOL_NOTES or (kind.endswith(("_call", "_output")) and kind not in TOOL_SILENT):
        note_item(history, item, kind)
    elif kind not in TOOL_SILENT:
        if not isinstance(item.get("role"), str):
            message = f"{where}.type {kind_of(kind)} is not an item that can be served here"
            raise BadRequest(message, param=f"{where}.type")
        read_message_item(history, item, where)


def note_item(history: ItemHistory, item: Json, kind: str) -> None:
    """A labelled text, so that the model knows what a tool of OpenAI gave."""
    names = TOOL_NOTES.get(kind) or [name for name in item if name not in ("id", "type", "status")]
    told = {name: item[name] for name in names if item.get(name)}
    if told:
        text = json.dumps(told, ensure_ascii=False)
        history.add_text(f"[{kind}: {text[:MAX_NOTE]}]")


def read_message_item(history: ItemHistory, item: Json, where: str) -> None:
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or role not in SPEAKERS:
        raise invalid(f"{where}.role", f"one of {', '.join(SPEAKERS)}", role)
    if content is None and role != "assistant":
        raise invalid(f"{where}.content", "a string or a list of parts", content)
    parts = input_parts(content, f"{where}.content")
    if role == "user":
        history.say(role, parts)
    elif isinstance(parts, list):
        at, part = next((at, p) for at, p in enumerate(parts) if p["type"] != "text")
        message = f"{where}.content[{at}] is of a kind that only a user may send"
        raise BadRequest(message, param=f"{where}.content[{at}]")
    elif role == "assistant":
        history.add_text(parts)
    else:
        history.say(role, parts)


def input_parts(content: Any, where: str) -> str | list[Json]:
    """Content as one text if it is nothing but text, else as chat's parts."""
    if isinstance(content, str) or content is None:
        return content or ""
    if not isinstance(content, list):
        raise invalid(where, "a string or a list of parts", content)
    parts = [input_part(part, f"{where}[{at}]") for at, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def input_part(part: Any, where: str) -> Json:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise invalid(where, "an object with a type", part)
    if reader := PART_READERS.get(kind):
        return reader(part, where)
    if isinstance(part.get("text"), str):  # summary_text, reasoning_text and what is to come
        return input_text_part(part, where)
    raise invalid(f"{where}.type", f"one of {', '.join(sorted(PART_READERS))}", kind)


def input_text_part(part: Json, where: str) -> Json:
    text = part.get("text", part.get("refusal"))
    if not isinstance(text, str):
        raise invalid(f"{where}.text", "a string", text)
    return {"type": "text", "text": text}


def input_image_part(part: Json, where: str) -> Json:
    url, detail = part.get("image_url"), part.get("detail")
    url = url.get("url") if isinstance(url, dict) else url  # chat's shape, sent by mistake
    if url is None and isinstance(part.get("file_id"), str):
        return {"type": "file", "file": {"file_id": part["file_id"]}}
    if not isinstance(url, str):
        raise invalid(f"{where}.image_url", "a URL as a string, or a file_id beside it", url)
    known = {"detail": detail} if detail in ("auto", "low", "high") else {}
    return {"type": "image_url", "image_url": {"url": url, **known}}


def input_file_part(part: Json, where: str) -> Json:
    names = ("file_data", "file_url", "file_id", "filename")
    given = {name: part[name] for name in names if part.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, str):
            raise invalid(f"{where}.{name}", "a string", value)
    if not given.keys() - {"filename"}:
        raise invalid(where, "a file with file_data, file_url or file_id", part)
    data = given.get("file_data")
    if data and not data.startswith("data:"):
        ending = given.get("filename", "").rpartition(".")[2].lower()
        mime = FILE_KINDS.get(ending, "application/octet-stream")
        given["file_data"] = f"data:{mime};base64,{data}"
    return {"type": "file", "file": given}


def input_audio_part(part: Json, where: str) -> Json:
    audio = part.get("input_audio")
    if not isinstance(audio, dict):
        raise invalid(f"{where}.input_audio", "an object with data and format", audio)
    return {"type": "input_audio", "input_audio": audio}


PART_READERS: Mapping[str, Callable[[Json, str], Json]] = {
    "input_text": input_text_part,
    "output_text": input_text_part,
    "text": input_text_part,
    "refusal": input_text_part,
    "input_image": input_image_part,
    "image_url": input_image_part,
    "computer_screenshot": input_image_part,
    "input_file": input_file_part,
    "input_audio": input_audio_part,
}


def call_id_of(item: Json, where: str) -> str:
    """What joins a call and its output; local_shell_call_output has it as its `id`."""
    found = item.get("call_id") or item.get("id")
    if not isinstance(found, str):
        raise invalid(f"{where}.call_id", "a string, and not empty", item.get("call_id"))
    return found


def namespace_of(item: Json) -> str:
    namespace = item.get("namespace")
    return namespace if isinstance(namespace, str) else ""


def read_call_item(history: ItemHistory, item: Json, where: str) -> None:
    name, arguments = required_text(item, "name", where), item.get("arguments")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if arguments is not None and not isinstance(arguments, str):
        raise invalid(f"{where}.arguments", "a string", arguments)
    tool = ToolName("function", name, namespace_of(item))
    history.add_call(call_id_of(item, where), tool, arguments or "{}")


def read_custom_call_item(history: ItemHistory, item: Json, where: str) -> None:
    name, text = required_text(item, "name", where), item.get("input")
    if not isinstance(text, str):
        raise invalid(f"{where}.input", "a string", text)
    arguments = json.dumps({"input": text}, ensure_ascii=False)
    tool = ToolName("custom", name, namespace_of(item))
    history.add_call(call_id_of(item, where), tool, arguments)


def read_typed_call_item(history: ItemHistory, item: Json, where: str) -> None:
    row = TYPED_ITEMS[item["type"]]
    given = item.get(row.member)
    if row.extra and any(item.get(name) != value for name, value in row.extra.items()):
        return  # a tool search that OpenAI ran
    if not isinstance(given, dict):
        raise invalid(f"{where}.{row.member}", "an object", given)
    told = {name: v for name, v in given.items() if v is not None and row.fixed.get(name) != v}
    arguments = json.dumps(told, ensure_ascii=False)
    history.add_call(call_id_of(item, where), ToolName(row.kind, row.kind), arguments)


def read_output_item(history: ItemHistory, item: Json, where: str) -> None:
    """The output of any call: text, parts, or other JSON as text."""
    content = output_content(item.get("output"), f"{where}.output")
    history.answer(call_id_of(item, where), content, item.get("status") == "failed")


def output_content(output: Any, where: str) -> str | list[Json]:
    if isinstance(output, str) or output is None:
        return output or ""
    if isinstance(output, list) and output and all(is_part(part) for part in output):
        return input_parts(output, where)
    return json.dumps(output, ensure_ascii=False)


def is_part(value: Any) -> bool:
    return isinstance(value, dict) and str(value.get("type")) in PART_READERS


def read_screen_item(history: ItemHistory, item: Json, where: str) -> None:
    """What a computer tool saw: the user shows it."""
    label: Json = {"type": "text", "text": "[computer_call_output]"}
    history.say("user", [label, input_part(item.get("output"), f"{where}.output")])


def read_search_output_item(history: ItemHistory, item: Json, where: str) -> None:
    """Tools that were found; `plan_tools` has put them on offer."""
    if item.get("execution") != "client" or not item.get("call_id"):
        return
    found = [name for tool in item["tools"] for name in read_tool(tool, f"{where}.tools")]
    names = [history.plan.chat_name(tool) for tool, made in found if made is not None]
    text = f"Available now: {', '.join(names)}" if names else "No tool was found."
    history.answer(call_id_of(item, where), text)


def read_update_item(history: ItemHistory, item: Json, where: str) -> None:
    for name in ("reasoning", "text"):
        if isinstance(item.get(name), dict):
            history.updates[name] = item[name]


def read_compaction_item(history: ItemHistory, item: Json, where: str) -> None:
    history.say("user", COMPACTED)


def read_nothing(history: ItemHistory, item: Json, where: str) -> None:
    """additional_tools: `plan_tools` has read it."""


# ----- reasoning and its carriers -----

# encrypted_content that we send is seal(origin, "<kind>.<tag>.<data>"), so that every opaque
# value comes back with the item it belongs to and reaches only the provider it came from:
#   p  tag = mark of the text the item shows, data = JSON of its reasoning_details without origin;
#      a text that is the one shown is null there
#   x  data = JSON of [call id, its extra_content] (Gemini's thought signatures); no tag


def carrier(origin: str, kind: str, tag: str, data: object) -> str:
    return seal(origin, f"{kind}.{tag}.{JSON_TEXT.encode(data)}")


# The readable member of a piece of reasoning.
PIECE_TEXTS: Mapping[str, str] = {"reasoning.text": "text", "reasoning.summary": "summary"}


def text_mark(text: str) -> str:
    """A short mark of a text: a signature must not go back with a text somebody edited."""
    return f"{zlib.crc32(text.encode('utf-8', 'replace')):08x}"


def read_reasoning_item(history: ItemHistory, item: Json, where: str) -> None:
    texts = reasoning_texts(item, where)
    sealed = item.get("encrypted_content")
    if sealed is not None and not isinstance(sealed, str):
        raise invalid(f"{where}.encrypted_content", "a string", sealed)
    text = "\n\n".join(texts)
    if not sealed:
        history.add_thought(text, ())
    elif not sealed.startswith(SEAL):
        own = item["id"] if isinstance(item.get("id"), str) else ""
        history.add_thought(text, openai_pieces(own, texts, sealed))
    else:
        open_carrier(history, texts, sealed)


def reasoning_texts(item: Json, where: str) -> list[str]:
    """The readable text of a reasoning item: its summary, or the content some providers give."""
    texts: list[str] = []
    for name in ("summary", "content"):
        parts = item.get(name)
        if parts is not None and not isinstance(parts, list):
            raise invalid(f"{where}.{name}", "a list of parts", parts)
        for at, part in enumerate(parts or ()):
            if not isinstance(part, dict):
                raise invalid(f"{where}.{name}[{at}]", "an object with a text", part)
            texts.append(input_text_part(part, f"{where}.{name}[{at}]")["text"])
        if any(texts):
            break
    return texts


def open_carrier(history: ItemHistory, texts: list[str], sealed: str) -> None:
    """Put what a carrier holds back in its place; a damaged one leaves readable text only."""
    origin, value = unseal(sealed)
    kind, tag, data = (*value.split(".", 2), "", "")[:3]
    text, found = "\n\n".join(texts), read_json(data.encode())
    found = found if isinstance(found, list) else []
    if kind == "x" and len(found) == 2 and isinstance(found[0], str):
        history.add_extra(*found)
        return
    pieces = [piece for piece in found if isinstance(piece, dict)] if kind == "p" else []
    kept = (piece_again(piece, text, tag) for piece in pieces)
    history.add_thought(text, [{**piece, "origin": origin} for piece in kept if piece])


def piece_again(piece: Json, text: str, mark: str) -> Json | None:
    """A piece with its text, or None if somebody changed the text that was signed."""
    member = PIECE_TEXTS.get(str(piece.get("type")))
    if member is None or piece.get(member) is not None:
        return piece
    return {**piece, member: text} if mark == text_mark(text) else None


def openai_pieces(own: str, texts: list[str], data: str) -> list[Json]:
    """A reasoning item as OpenAI itself gave it."""
    rest: Json = {"origin": "openai"} | ({"id": own} if own else {})
    shown = [{"type": "reasoning.summary", "summary": text, **rest} for text in texts if text]
    return [*shown, {"type": "reasoning.encrypted", "data": data, **rest}]


ITEM_READERS: Mapping[str, Callable[[ItemHistory, Json, str], None]] = {
    "message": read_message_item,
    "reasoning": read_reasoning_item,
    "function_call": read_call_item,
    "custom_tool_call": read_custom_call_item,
    "function_call_output": read_output_item,
    "custom_tool_call_output": read_output_item,
    "local_shell_call_output": read_output_item,
    "shell_call_output": read_output_item,
    "apply_patch_call_output": read_output_item,
    "computer_call_output": read_screen_item,
    "tool_search_output": read_search_output_item,
    "additional_tools": read_nothing,
    "configuration_update": read_update_item,
    "compaction": read_compaction_item,
    **dict.fromkeys(TYPED_ITEMS, read_typed_call_item),
}


# ----- the answer -----


# Members of a Response that repeat the request, and what they are when it does not say.
RESPONSE_ECHO: Json = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "service_tier": "default",
    "store": True,
    "temperature": 1.0,
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}
# Members of a delta beside its calls.
SPOKEN = ("reasoning_content", "reasoning_details", "content", "refusal", "annotations")
FILTERED = "The answer was stopped by the provider's content filter."
FAILURE_CODES = frozenset(
    ("context_length_exceeded", "insufficient_quota", "rate_limit_exceeded", "invalid_prompt")
)


def response_head(opening: Opening, codex: bool) -> Json:
    """A Response without its outcome. Codex does not read the echo of what is large."""
    unread = ("instructions", "tools") if codex else ()
    asked = {name: value for name, value in opening.request.items() if name not in unread}
    echo = {
        name: default if asked.get(name) is None else asked[name]
        for name, default in RESPONSE_ECHO.items()
    }
    return {
        "id": f"resp_{opening.id}",
        "object": "response",
        "created_at": opening.created,
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "model": opening.model,
        "output": [],
        **echo,
        "reasoning": {"effort": None, "summary": None, **(asked.get("reasoning") or {})},
        "text": {"format": {"type": "text"}, **(asked.get("text") or {})},
        "usage": None,
    }


def response_usage(usage: Mapping[str, Any] | None, opening: Opening, chars: int) -> Json:
    """Complete counts, as Codex wants them; estimated when the provider gave none."""
    if not usage:
        guess = -(-chars // 4)
        given = {"prompt_tokens": opening.input_tokens, "completion_tokens": guess}
        usage = {**given, "estimated": True}
    prompt = usage_count(usage, "prompt_tokens")
    completion = usage_count(usage, "completion_tokens")
    read, made = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
    cached = {
        "cached_tokens": usage_count(read, "cached_tokens"),
        "cache_write_tokens": usage_count(read, "cache_creation_tokens"),
    }
    total = usage.get("total_tokens")
    return {
        "input_tokens": prompt,
        "input_tokens_details": cached,
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": usage_count(made, "reasoning_tokens")},
        "total_tokens": total if isinstance(total, int) else prompt + completion,
        **({"estimated": True} if usage.get("estimated") else {}),
    }


def usage_count(counts: Any, name: str) -> int:
    value = counts.get(name) if isinstance(counts, dict) else None
    return value if isinstance(value, int) else 0


def failure_of(error: RouterError) -> Json:
    """The error object of response.failed.

    Codex CLI 0.159 retries rate_limit_exceeded after the delay it reads in the text, compacts at
    context_length_exceeded, gives up at invalid_prompt and tries server_error again.
    """
    message, code = error.message, error.code or ""
    if error.status == 429 and code not in FAILURE_CODES:
        code = "rate_limit_exceeded"
    elif code not in FAILURE_CODES:
        code = "invalid_prompt" if error.status in (400, 413, 422) else "server_error"
    if error.retry_after is not None and "try again in" not in message.lower():
        seconds = max(1, math.ceil(error.retry_after))
        message = f"{message.rstrip('. ')}. Please try again in {seconds}s."
    return {"code": code, "message": message}


def responses_error(error: RouterError) -> Json:
    """The body of an HTTP error: OpenAI's envelope, as on the chat endpoint."""
    return error_body(error)


class EventLog:
    """Numbered Responses events as bytes, until they are taken."""

    def __init__(self) -> None:
        self._number = 0
        self._events: list[bytes] = []

    def emit(self, kind: str, members: Json) -> None:
        self.emit_text(kind, JSON_TEXT.encode(members)[1:-1])

    def emit_text(self, kind: str, members: str) -> None:
        """`members`: JSON text without its braces."""
        self.emit_delta(f'event: {kind}\ndata: {{"type":"{kind}",{members}', "")

    def emit_delta(self, head: str, value: str) -> None:
        """`head`: an event up to its last value, `value` JSON text. The way of every text delta.

        Half a surrogate pair, which a provider may send, is no text and becomes a "?".
        """
        event = f'{head}{value},"sequence_number":{self._number}}}\n\n'
        self._events.append(event.encode("utf-8", "replace"))
        self._number += 1

    def take(self) -> bytes:
        events, self._events = self._events, []
        return b"".join(events)

    def go_on_from(self, number: int) -> None:
        """The next event gets this number: another stream came that far."""
        self._number = number


def delta_head(kind: str, **members: object) -> str:
    inner = JSON_TEXT.encode(members)[1:-1]
    return f'event: {kind}\ndata: {{"type":"{kind}",{inner},"delta":'


class OpenItem:
    """An output item that is still being written; only one is open at a time."""

    def __init__(self, log_: EventLog, own: str, index: int) -> None:
        self.log, self.own, self.index = log_, own, index

    @property
    def place(self) -> Json:
        return {"item_id": self.own, "output_index": self.index}

    def begin(self) -> None:
        self.log.emit("response.output_item.added", self._member("in_progress"))

    def end(self, status: str) -> Json:
        """Close the item; what it holds in the end."""
        self.close()
        self.log.emit("response.output_item.done", self._member(status))
        return self.item(status)

    def close(self) -> None:
        """The events before output_item.done."""

    def item(self, status: str) -> Json:
        raise NotImplementedError

    def _member(self, status: str) -> Json:
        return {"output_index": self.index, "item": self.item(status)}


class OpenMessage(OpenItem):
    """A message: its text, then perhaps a refusal."""

    def __init__(self, log_: EventLog, own: str, index: int) -> None:
        super().__init__(log_, own, index)
        self._parts: list[Json] = []
        self._kind = ""  # of the open part: output_text or refusal
        self._texts: list[str] = []
        self._notes: list[Json] = []
        self._head = ""

    def add(self, kind: str, text: str) -> None:
        if kind != self._kind:
            self._open_part(kind)
        self._texts.append(text)
        self.log.emit_delta(self._head, JSON_TEXT.encode(text))

    def annotate(self, note: Json) -> None:
        at = {"annotation_index": len(self._notes), "annotation": note}
        self._notes.append(note)
        kind = "response.output_text.annotation.added"
        self.log.emit(kind, {**self.place, "content_index": len(self._parts), **at})

    @property
    def has_text(self) -> bool:
        return self._kind == "output_text"

    def close(self) -> None:
        if self._kind:
            part, place = self._part(), {**self.place, "content_index": len(self._parts)}
            self._parts.append(part)
            name = "text" if self._kind == "output_text" else "refusal"
            rest: Json = {"logprobs": []} if name == "text" else {}
            self.log.emit(f"response.{self._kind}.done", {**place, **rest, name: part[name]})
            self.log.emit("response.content_part.done", {**place, "part": part})
        self._kind, self._texts, self._notes = "", [], []

    def item(self, status: str) -> Json:
        head = {"id": self.own, "type": "message", "status": status, "role": "assistant"}
        return {**head, "content": list(self._parts)}

    def _open_part(self, kind: str) -> None:
        self.close()
        self._kind = kind
        place = {**self.place, "content_index": len(self._parts)}
        self.log.emit("response.content_part.added", {**place, "part": self._part()})
        rest: Json = {"logprobs": []} if kind == "output_text" else {}
        self._head = delta_head(f"response.{kind}.delta", **place, **rest)

    def _part(self) -> Json:
        text = "".join(self._texts)
        if self._kind == "refusal":
            return {"type": "refusal", "refusal": text}
        return {"type": "output_text", "annotations": self._notes, "logprobs": [], "text": text}


class OpenThought(OpenItem):
    """A reasoning item: readable text as its summary, opaque pieces in encrypted_content."""

    def __init__(self, log_: EventLog, own: str, index: int, origin: str) -> None:
        super().__init__(log_, own, index)
        self.sealed = ""
        self._origin = origin  # of text without a piece
        self._pieces: list[Json] = []
        self._texts: list[str] = []
        self._head = ""

    def add(self, text: str) -> None:
        if not self._texts:
            at = {**self.place, "summary_index": 0}
            part = {"type": "summary_text", "text": ""}
            self.log.emit("response.reasoning_summary_part.added", {**at, "part": part})
            self._head = delta_head("response.reasoning_summary_text.delta", **at)
        self._texts.append(text)
        self.log.emit_delta(self._head, JSON_TEXT.encode(text))

    def takes(self, piece: Json) -> bool:
        """Does this piece ({}: a bare text) belong to the item? A signature or a key ends one."""
        last = self._pieces[-1] if self._pieces else {}
        if any(piece.get(n) is not None and piece.get(n) == last.get(n) for n in ("id", "index")):
            return True
        ended = last.get("signature") or last.get("type") == "reasoning.encrypted"
        return not ended and not (piece.get("id") and last.get("id"))

    def keep(self, piece: Json) -> None:
        """Keep a piece to be sent back; one that goes on with the last is joined to it."""
        last = self._pieces[-1] if self._pieces else {}
        member = PIECE_TEXTS.get(str(piece.get("type")))
        same = all(last.get(name) == piece.get(name) for name in ("type", "index"))
        same = same and (piece.get("index") is not None or not piece.get("id"))
        if not last or member is None or not same or (last.get("signature") and piece.get(member)):
            self._pieces.append(dict(piece))
            return
        joined = f"{last.get(member) or ''}{piece.get(member) or ''}"
        last.update({name: value for name, value in piece.items() if value is not None})
        last[member] = joined

    def close(self) -> None:
        origins = (piece["origin"] for piece in self._pieces if piece.get("origin"))
        origin = next(origins, self._origin)
        if origin and not self.sealed:
            kept = [self._piece(piece) for piece in self._pieces or [{"type": "reasoning.text"}]]
            self.sealed = carrier(origin, "p", text_mark(self.text), kept)
        if self._texts:
            at = {**self.place, "summary_index": 0}
            part = {"type": "summary_text", "text": self.text}
            self.log.emit("response.reasoning_summary_text.done", {**at, "text": self.text})
            self.log.emit("response.reasoning_summary_part.done", {**at, "part": part})

    def item(self, status: str) -> Json:
        summary = [{"type": "summary_text", "text": self.text}] if self._texts else []
        head = {"id": self.own, "type": "reasoning", "summary": summary}
        return {**head, "encrypted_content": self.sealed or None}

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def _piece(self, piece: Json) -> Json:
        kept = {name: value for name, value in piece.items() if name != "origin"}
        member = PIECE_TEXTS.get(str(piece.get("type")), "")
        return {**kept, member: None} if self._texts and kept.get(member) == self.text else kept


class OpenCall(OpenItem):
    """A call. Arguments of functions are passed on as they come, others are known at the end."""

    PREFIXES: ClassVar[Mapping[str, str]] = {"function": "fc", "custom": "ctc"}

    def __init__(self, log_: EventLog, own: str, index: int, call: CallState) -> None:
        super().__init__(log_, own, index)
        self.call = call
        live = call.tool.kind == "function"
        kind = "response.function_call_arguments.delta"
        self._head = delta_head(kind, **self.place) if live else ""
        self._closed = False

    def begin(self) -> None:
        super().begin()
        if text := self.call.text:
            self.add(text)

    def add(self, text: str) -> None:
        if self._head and text:
            self.log.emit_delta(self._head, JSON_TEXT.encode(text))

    def close(self) -> None:
        kind, text = self.call.tool.kind, self.call.text
        self._closed = True
        if kind == "function":
            if not text:  # a call without arguments (recorded at openrouter)
                self.call.add("{}")
                self.add("{}")
            done = {"name": self.call.tool.name, "arguments": self.call.text}
            self.log.emit("response.function_call_arguments.done", {**self.place, **done})
        elif kind == "custom":
            given = self.call.custom_input()
            event = "response.custom_tool_call_input"
            self.log.emit(f"{event}.delta", {**self.place, "delta": given})
            self.log.emit(f"{event}.done", {**self.place, "input": given})

    def item(self, status: str) -> Json:
        tool = self.call.tool
        space = {"namespace": tool.namespace} if tool.namespace else {}
        head: Json = {"id": self.own, "call_id": self.call.id, "status": status}
        if tool.kind == "custom":
            given = self.call.custom_input() if self._closed else ""
            return {**head, "type": "custom_tool_call", "name": tool.name, "input": given, **space}
        if row := TYPED_TOOLS.get(tool.kind):
            member = {row.member: {**row.fixed, **self.call.arguments()}}
            return {**head, "type": row.item, **member, **row.extra}
        text = self.call.text if self._closed else ""
        return {**head, "type": "function_call", "name": tool.name, "arguments": text, **space}


class CallState:
    """One tool call of the model, gathered from its deltas."""

    def __init__(self) -> None:
        self.id = self.name = ""
        self.tool = ToolName("function", "")
        self.extra: object = None
        self.native = False  # a custom call of a provider that knows them: plain text
        self.started = self.ended = False
        self._texts: list[str] = []
        self._whole: bool | None = None

    def add(self, text: str) -> None:
        self._texts.append(text)
        self._whole = None

    @property
    def text(self) -> str:
        if len(self._texts) > 1:
            self._texts = ["".join(self._texts)]
        return self._texts[0] if self._texts else ""

    @property
    def whole(self) -> bool:
        """Are the arguments a JSON object, so that nothing more can follow?"""
        if self._whole is None:
            text = self._texts[-1].rstrip() if self._texts and not self.native else ""
            self._whole = text.endswith("}") and isinstance(self._parsed(), dict)
        return self._whole

    def arguments(self) -> Json:
        found = self._parsed()
        return found if isinstance(found, dict) else {}

    def custom_input(self) -> str:
        """The text in {"input": text}; models also send the bare text, or another name."""
        if self.native:
            return self.text
        found = self._parsed()
        if isinstance(found, str):
            return found
        members = found if isinstance(found, dict) else {}
        texts = [value for value in members.values() if isinstance(value, str)]
        if isinstance(members.get("input"), str):
            return str(members["input"])
        return texts[0] if len(texts) == 1 else self.text

    def _parsed(self) -> Any:
        return read_json(self.text.encode("utf-8", "replace"))


class ResponsesWriter:
    """Canonical chunks in, Responses events out, in the order OpenAI sends them.

    One item is open at a time. Parallel calls whose deltas are mixed come out one after another:
    the next begins when the one before is a whole JSON object; text in between waits for that.
    `earlier` is what `responses_to_chat` got. With `codex`, endings are those Codex CLI takes well
    (docs: length is completed, a filter is failed, refusals are text) and the request is not
    echoed. `response` is the final Response once `finish` or `fail` was called, for the store.
    """

    def __init__(
        self,
        opening: Opening,
        codex: bool = False,
        earlier: Sequence[Json] = (),
        origin: str = "",
    ) -> None:
        self.response: Json | None = None
        self._origin = origin
        self._opening, self._codex = opening, codex
        self._plan = plan_tools(opening.request, earlier)
        known = (item.get("call_id") for _, item in all_items(opening.request, earlier))
        self._taken = {own for own in known if isinstance(own, str)}
        self._head = response_head(opening, codex)
        self._head_text = ""
        self._log = EventLog()
        self._output: list[Json] = []
        self._open: OpenItem | None = None
        self._calls: dict[object, CallState] = {}
        self._later: list[Json] = []  # deltas that came in the middle of a call
        self.broken = False  # reasoning_content was seen: it is all there is to read
        self._notes: list[Json] = []  # annotations that came before their text
        self._usage: Json | None = None
        self._finish = ""
        self._chars = 0

    def go_on_from(self, number: int) -> None:
        """The next event gets this number: the client has the ones before from elsewhere."""
        self._log.go_on_from(number)

    def feed(self, chunk: Json) -> bytes:
        """The events for one canonical chunk."""
        if self.response is not None:
            return b""
        self._begin(chunk)
        if usage := chunk.get("usage"):
            self._usage = usage
        for choice in chunk.get("choices") or ():
            if not choice.get("index"):
                self._take(choice.get("delta") or {})
                self._finish = choice.get("finish_reason") or self._finish
        return self._log.take()

    def finish(self) -> bytes:
        """The end of a stream that came to its end."""
        if self.response is not None:
            return b""
        self._begin({})
        self._start_rest()
        reason = {"length": "max_output_tokens", "content_filter": "content_filter"}
        cut = reason.get(self._finish, "")
        for delta in self._later:
            self._speak(delta)
        self._close("incomplete" if cut and not self._codex else "completed")
        if cut == "content_filter" and self._codex:
            self._end("failed", error={"code": "invalid_prompt", "message": FILTERED})
        elif cut and not self._codex:
            self._end("incomplete", incomplete_details={"reason": cut})
        else:
            self._end("completed")
        return self._log.take()

    def fail(self, error: RouterError) -> bytes:
        """The end of a stream that broke, or never began."""
        if self.response is not None:
            return b""
        self._begin({})
        self._end("failed", error=failure_of(error))
        return self._log.take()

    def beat(self) -> bytes:
        """A sign of life; Codex does not count comments as one."""
        if self.response is not None:
            return b""
        if not self._head_text:
            self._begin({})
        else:
            self._log.emit_text("response.in_progress", self._head_text)
        return self._log.take()

    def _begin(self, chunk: Json) -> None:
        if self._head_text:
            return
        self._head["model"] = self._head["model"] or str(chunk.get("model") or "")
        self._head_text = f'"response":{JSON_TEXT.encode(self._head)}'
        self._log.emit_text("response.created", self._head_text)
        self._log.emit_text("response.in_progress", self._head_text)

    def _end(self, status: str, **outcome: object) -> None:
        usage = None
        if status != "failed" or self._usage:
            usage = response_usage(self._usage, self._opening, self._chars)
        outcome = {"status": status, "output": self._output, "usage": usage, **outcome}
        self.response = {**self._head, **outcome}
        self._log.emit(f"response.{status}", {"response": self.response})

    def _take(self, delta: Json) -> None:
        if isinstance(self._open, OpenCall):
            self._wait_or_speak({name: delta[name] for name in SPOKEN if delta.get(name)})
        else:
            self._speak(delta)
        for at, call in enumerate(delta.get("tool_calls") or ()):
            self._hear_call(call, at)

    def _wait_or_speak(self, delta: Json) -> None:
        """What is said while a call is open must not cut the call in two."""
        if not delta:
            return
        if self._later or (isinstance(self._open, OpenCall) and not self._open.call.whole):
            self._later.append(delta)
        else:
            self._speak(delta)

    def _speak(self, delta: Json) -> None:
        """All of a delta but its calls."""
        text = delta.get("content")
        if delta.get("reasoning_content") or delta.get("reasoning_details"):
            self._think(delta)
        if text:
            self._say("output_text", text)
        if refusal := delta.get("refusal"):
            self._say("output_text" if self._codex else "refusal", refusal)
        for note in delta.get("annotations") or ():
            self._annotate(flat_annotation(note))

    def _say(self, kind: str, text: str) -> None:
        item = self._open
        if not isinstance(item, OpenMessage):
            item = OpenMessage(self._log, self._own("msg"), len(self._output))
            self._start(item)
        item.add(kind, text)
        self._chars += len(text)
        if self._notes and item.has_text:
            notes, self._notes = self._notes, []
            for note in notes:
                item.annotate(note)

    def _annotate(self, note: Json) -> None:
        if isinstance(self._open, OpenMessage) and self._open.has_text:
            self._open.annotate(note)
        else:
            self._notes.append(note)

    def _think(self, delta: Json) -> None:
        """Reasoning: pieces are shown unless reasoning_content told their text already."""
        text, pieces = delta.get("reasoning_content") or "", delta.get("reasoning_details") or ()
        self.broken = self.broken or bool(text)
        if text and not any(readable_text(piece) for piece in pieces):
            self._show(self._thought({}), text)
        shown = bool(text) or not self.broken
        for piece in pieces:
            item = self._thought(piece)
            if shown and (part := readable_text(piece)):
                self._show(item, part)
            item.keep(piece)

    def _show(self, item: OpenThought, text: str) -> None:
        item.add(text)
        self._chars += len(text)

    def _thought(self, piece: Json) -> OpenThought:
        """The open reasoning item, or a new one when this piece belongs to another."""
        item = self._open
        if not isinstance(item, OpenThought) or not item.takes(piece):
            item = OpenThought(self._log, self._own("rs"), len(self._output), self._origin)
            self._start(item)
        return item

    def _hear_call(self, delta: Json, at: int) -> None:
        key = delta.get("index")
        call = self._calls.setdefault(at if key is None else key, CallState())
        spec = delta.get("custom") or delta.get("function") or {}
        call.native = call.native or bool(delta.get("custom"))
        call.id = call.id or delta.get("id") or ""
        call.name = call.name or spec.get("name") or ""
        call.extra = delta.get("extra_content") or call.extra
        text = spec.get("arguments") or spec.get("input") or ""
        if call.ended:
            if text.strip():
                log.warning("a tool call went on after its end; the rest is dropped")
            return
        self._chars += len(text)
        call.add(text)
        if isinstance(self._open, OpenCall) and self._open.call is call:
            self._open.add(text)
        self._advance()

    def _advance(self) -> None:
        """Begin the calls that wait, as long as the open one is whole."""
        for call in self._calls.values():
            if call.started or not call.name:
                continue
            if isinstance(self._open, OpenCall) and not self._open.call.whole:
                return
            self._start_call(call)

    def _start_rest(self) -> None:
        """At the end: every call that still waits, whole or not."""
        for call in self._calls.values():
            if not call.started and call.name:
                self._start_call(call)
            elif not call.name:
                log.warning("a tool call without a name is dropped")

    def _start_call(self, call: CallState) -> None:
        tool = self._plan.client_name(call.name)
        call.tool = tool._replace(kind="custom") if call.native else tool
        self._close()
        prefix = OpenCall.PREFIXES.get(call.tool.kind, "tc")
        call.id, call.started = self._call_id(call.id), True
        self._start(OpenCall(self._log, self._own(prefix), len(self._output), call))

    def _call_id(self, given: str) -> str:
        """The provider's call id. Some count from call_0 in every turn (Bedrock Mantle)."""
        stem = given or f"call_{self._opening.id}{len(self._output)}"
        found = stem
        for n in itertools.count():
            if found not in self._taken:
                break
            found = f"{stem}_{self._opening.id[:8]}{n or ''}"
        self._taken.add(found)
        return found

    def _own(self, prefix: str) -> str:
        """The id of the item that comes next."""
        self._close()
        return f"{prefix}_{self._opening.id}{len(self._output)}"

    def _start(self, item: OpenItem) -> None:
        self._open = item
        item.begin()

    def _close(self, status: str = "completed") -> None:
        item, self._open = self._open, None
        if item is None:
            return
        if isinstance(item, OpenCall):
            item.call.ended = True
            status = "completed" if item.call.whole else status
        self._output.append(item.end(status))
        if isinstance(item, OpenCall) and item.call.extra is not None:
            self._carry_extra(item.call)

    def _carry_extra(self, call: CallState) -> None:
        """A reasoning item of nothing but what the provider wants back with this call."""
        item = OpenThought(self._log, self._own("rs"), len(self._output), self._origin)
        item.sealed = carrier("call", "x", "", [call.id, call.extra])
        self._start(item)
        self._close()


def readable_text(piece: Json) -> str:
    return str(piece.get("text") or piece.get("summary") or "")


def flat_annotation(note: Json) -> Json:
    """Chat nests what Responses has beside the type."""
    inner = note.get(str(note.get("type")))
    return {"type": note.get("type"), **inner} if isinstance(inner, dict) else note


def chat_reply_to_responses(
    reply: Json,
    opening: Opening,
    codex: bool = False,
    earlier: Sequence[Json] = (),
    origin: str = "",
) -> Json:
    """The Response for a whole canonical reply: the last object of the same answer as a stream."""
    writer = ResponsesWriter(opening, codex, earlier, origin)
    choices = [{**choice, "delta": choice.get("message")} for choice in reply.get("choices") or ()]
    writer.feed({"model": reply.get("model"), "usage": reply.get("usage"), "choices": choices})
    writer.finish()
    return cast(Json, writer.response)


# ----- the store -----


class Kept(NamedTuple):
    """One stored response as JSON bytes, so that its size is known and nobody can change it."""

    items: bytes  # the input of this turn
    response: bytes
    previous: str
    expires: float  # on the store's clock

    @property
    def size(self) -> int:
        return len(self.items) + len(self.response)


class ResponseStore:
    """Responses that previous_response_id may refer to, each caller's own.

    Bounded by entries and bytes; the least recently used goes first, and each is forgotten
    `ttl_s` seconds after its last use. One lock, held for dictionary work only. `now` is a
    monotonic clock in seconds.
    """

    def __init__(
        self,
        max_entries: int = 10_000,
        max_bytes: int = 256 << 20,
        ttl_s: float = 30 * 86_400.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_entries, self._max_bytes, self._ttl_s = max_entries, max_bytes, ttl_s
        self._now = now
        self._lock = threading.Lock()
        self._kept: dict[tuple[str, str], Kept] = {}  # the least recently used first
        self._bytes = 0

    def put(self, caller: str, own: str, items: Sequence[Json], response: Json) -> None:
        """Keep one turn: the items of its input and its Response, unless store is false."""
        if response.get("store") is False:
            return
        previous = str(response.get("previous_response_id") or "")
        expires = self._now() + self._ttl_s
        kept = Kept(stored_json(list(items)), stored_json(response), previous, expires)
        if kept.size > self._max_bytes:
            return
        with self._lock:
            self._drop((caller, own))
            self._kept[caller, own] = kept
            self._bytes += kept.size
            self._shrink()

    def get(self, caller: str, own: str) -> Json | None:
        """The Response, or None when there is none (any more) of this caller."""
        with self._lock:
            kept = self._touch((caller, own))
        return cast(Json, json.loads(kept.response)) if kept else None

    def items(self, caller: str, own: str) -> list[Json] | None:
        """The input items of one stored turn, or None."""
        with self._lock:
            kept = self._touch((caller, own))
        return cast("list[Json]", json.loads(kept.items)) if kept else None

    def delete(self, caller: str, own: str) -> bool:
        """Was there anything to delete?"""
        with self._lock:
            there = self._touch((caller, own)) is not None
            self._drop((caller, own))
            return there

    def chain(self, caller: str, own: str) -> list[Json]:
        """All items up to and with the answer `own`, oldest first; BadRequest if one is gone."""
        turns: list[Kept] = []
        with self._lock:
            at = own
            while at:
                kept = self._touch((caller, at))
                if kept is None:
                    raise unknown_response(own)
                turns.append(kept)
                at = kept.previous
        items: list[Json] = []
        for kept in reversed(turns):
            items += json.loads(kept.items)
            items += json.loads(kept.response)["output"]
        return items

    def _touch(self, key: tuple[str, str]) -> Kept | None:
        """Mark as used; the turns before it in a chain are used later, so they stay longer."""
        kept, now = self._kept.get(key), self._now()
        if kept is None or kept.expires <= now:
            self._drop(key)
            return None
        del self._kept[key]
        self._kept[key] = kept = kept._replace(expires=now + self._ttl_s)
        return kept

    def _drop(self, key: tuple[str, str]) -> None:
        kept = self._kept.pop(key, None)
        self._bytes -= kept.size if kept else 0

    def _shrink(self) -> None:
        """Make room; entries are in order of use, so the expired ones come first as well."""
        now = self._now()
        while self._kept:
            key = next(iter(self._kept))
            fits = len(self._kept) <= self._max_entries and self._bytes <= self._max_bytes
            if fits and self._kept[key].expires > now:
                return
            self._drop(key)


def stored_json(value: object) -> bytes:
    return JSON_TEXT.encode(value).encode("utf-8", "replace")


def unknown_response(own: str) -> BadRequest:
    """As OpenAI says it, for an id nobody stored, of another caller, or forgotten since."""
    message = f"Previous response with id '{own}' not found."
    return BadRequest(message, param="previous_response_id", code="previous_response_not_found")


# =============================================================================
# 16. Responses out
# =============================================================================

# OpenAI's Responses API and Codex (the same wire under a ChatGPT plan), as providers.
# Facts: openai-python types and recorded traffic (2026-07 to 2026-10); what Codex refuses:
# reports in CLIProxyAPI, litellm and ChatMock (2026-09).
CODEX_INSTRUCTIONS: Final = "You are a helpful assistant."  # an empty text gets 400
ORPHAN: Final = "[result of a tool call that is not part of this conversation]"
MAX_CALL_ID: Final = 64  # characters; a longer call_id gets 400
MIN_OUTPUT_TOKENS: Final = 16  # less gets 400
SYSTEM_ROLES: Final = ("system", "developer")
# Words that OpenAI spells differently.
RESPONSE_EFFORTS: Final[Mapping[str, str]] = {"max": "xhigh"}
# Fields that mean the same in both dialects. Codex answers 400 to any other of them.
OPENAI_FIELDS: Final = (
    "temperature",
    "top_p",
    "metadata",
    "user",
    "safety_identifier",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
CODEX_FIELDS: Final = ("service_tier", "prompt_cache_key")
# Tools that the provider itself runs, or that only exist in this dialect: sent as they are.
HOSTED_TOOLS: Final = frozenset(
    {
        "apply_patch",
        "code_interpreter",
        "computer",
        "computer_use_preview",
        "file_search",
        "image_generation",
        "local_shell",
        "mcp",
        "namespace",
        "shell",
        "tool_search",
        "web_search",
        "web_search_preview",
    }
)


def chat_to_responses(
    chat: Json, model: str, origin: str, codex: bool = False, reasons: bool = True
) -> Json:
    """The Responses body for a chat body. BadRequest names the field that cannot be sent.

    `origin` is the provider's name: only its own encrypted reasoning goes back. `codex` asks
    for the stricter body of a ChatGPT plan. `reasons` = False leaves out everything about
    reasoning, which models without it refuse ("Encrypted content is not supported").
    """
    check_fields(chat, CHAT_FIELDS)
    instructions, messages = split_instructions(read_messages(chat))
    items = input_items(paired(messages), origin if reasons else "")
    if not items:
        raise BadRequest("messages must hold something besides empty ones", param="messages")
    body: Json = {
        "model": model,
        "input": items,
        "store": False,
        "stream": codex or chat.get("stream") is True,
    }
    if codex or instructions:
        body["instructions"] = instructions or CODEX_INSTRUCTIONS
    for name in CODEX_FIELDS if codex else OPENAI_FIELDS:
        if chat.get(name) is not None:
            body[name] = chat[name]
    if not codex and (limit := chat.get("max_completion_tokens") or chat.get("max_tokens")):
        body["max_output_tokens"] = max(limit, MIN_OUTPUT_TOKENS)
    body |= flat_tools(chat, codex)
    body |= text_member(chat)
    return body | reasoning_wish(chat, codex) if reasons else body


def read_messages(chat: Json) -> list[Json]:
    """The messages, checked; calls and results in the shape used since 2023."""
    messages = chat.get("messages")
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "a list of at least one message", messages)
    for at, message in enumerate(messages):
        check_turn(message, f"messages[{at}]")
    return list(without_functions(messages))


def check_turn(message: Any, where: str) -> None:
    """As check_message, but assistant and tool messages may do without content."""
    silent = isinstance(message, dict) and message.get("content") in (None, [])
    if silent and message.get("role") == "assistant":
        return check_calls(message, where)
    if silent and message.get("role") == "tool":
        message = {**message, "content": ""}
    check_message(message, where)
    content = message.get("content")
    for at, part in enumerate(content if isinstance(content, list) else ()):
        if part["type"] == "file" and not isinstance(part.get("file"), dict):
            raise invalid(f"{where}.content[{at}].file", "an object", part.get("file"))


def without_functions(messages: Sequence[Json]) -> Iterator[Json]:
    """`function_call` and the role `function` as tool calls and their results."""
    last = ""
    for at, message in enumerate(messages):
        call = message.get("function_call") if message["role"] == "assistant" else None
        if call is not None and not message.get("tool_calls"):
            last = f"call_{at}"
            yield {**message, "tool_calls": [{"id": last, "type": "function", "function": call}]}
        elif message["role"] == "function":
            yield {**message, "role": "tool", "tool_call_id": last}
        else:
            yield message


def split_instructions(messages: Sequence[Json]) -> tuple[str, Sequence[Json]]:
    """(the leading system texts, the other messages); at least one message is left over."""
    count = next((n for n, m in enumerate(messages) if m["role"] not in SYSTEM_ROLES), -1)
    if count < 0:
        count = len(messages) - 1
    return "\n".join(filter(None, map(message_text, messages[:count]))), messages[count:]


def paired(messages: Sequence[Json]) -> list[Json]:
    """Messages where each call has one result, after it and in its order, and each result a call.

    A missing result is made up, marked as an error; a result without a call becomes text of
    the user. Ids are unique within a turn; one that comes again in a later turn stays
    (Bedrock Mantle counts from call_0 in each, seen 2026-09).
    """
    starts = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    edges = itertools.pairwise([0, *starts, len(messages)])
    turns = (paired_turn(messages[a:b], number) for number, (a, b) in enumerate(edges) if a < b)
    return list(itertools.chain.from_iterable(turns))


def paired_turn(turn: Sequence[Json], number: int) -> list[Json]:
    """One assistant message and what follows it, until the next one."""
    head, rest = (turn[:1], turn[1:]) if turn[0]["role"] == "assistant" else ((), turn)
    waiting: dict[str, deque[Json]] = {}
    for message in rest:
        if message["role"] == "tool":
            waiting.setdefault(message.get("tool_call_id") or "", deque()).append(message)
    calls: list[Json] = []
    results: list[Json] = []
    for at, call in enumerate((head[0].get("tool_calls") or ()) if head else ()):
        found = waiting.get(call.get("id") or "")
        result = found.popleft() if found else {"role": "tool", "content": MISSING_RESULT}
        missing = {} if "tool_call_id" in result else {"is_error": True}
        call_id = fresh_id(call.get("id") or f"call_{number}_{at}", {c["id"] for c in calls})
        calls.append({**call, "id": call_id})
        results.append({**result, **missing, "tool_call_id": call_id})
    made = [{**head[0], "tool_calls": calls} if calls else head[0]] if head else []
    stray = {id(message) for queue in waiting.values() for message in queue}
    others = (m for m in rest if m["role"] != "tool" or id(m) in stray)
    return [*made, *results, *(stray_result(m) if id(m) in stray else m for m in others)]


def fresh_id(wanted: str, taken: set[str]) -> str:
    """`wanted`, shortened to what is accepted and told apart from the ids `taken`."""
    if len(wanted) > MAX_CALL_ID:
        wanted = f"{wanted[:40]}_{zlib.crc32(wanted.encode('utf-8', 'replace')):08x}"
    twins = (f"{wanted[:56]}_{n}" for n in itertools.count(2))
    return wanted if wanted not in taken else next(twin for twin in twins if twin not in taken)


def stray_result(message: Json) -> Json:
    """A tool result that no call asked for, as the user's words."""
    content = message.get("content") or ""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return {"role": "user", "content": [{"type": "text", "text": ORPHAN}, *parts]}


def input_items(messages: Sequence[Json], origin: str) -> list[Json]:
    """Chat messages, already paired, as the items of `input`."""
    items: list[Json] = []
    custom: set[str] = set()
    for message in messages:
        role = message["role"]
        if role == "assistant":
            custom = {c["id"] for c in message.get("tool_calls") or () if c.get("type") == "custom"}
            items += assistant_items(message, origin)
        elif role == "tool":
            items.append(result_item(message, message["tool_call_id"] in custom))
        else:
            parts = [item_part(part) for part in message_parts(message)]
            items.append(message_item("developer" if role in SYSTEM_ROLES else "user", parts))
    return items


def message_item(role: str, parts: list[Json]) -> Json:
    return {"type": "message", "role": role, "content": parts}


def message_parts(message: Json) -> list[Json]:
    """The content of a message as parts; [] when it has none."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return content if isinstance(content, list) else []


def item_part(part: Json) -> Json:
    """text, image_url and file as input_text, input_image and input_file; others unchanged."""
    kind = part["type"]
    if kind == "text":
        return {"type": "input_text", "text": part["text"]}
    if kind == "image_url":
        image = part["image_url"]
        image = {"url": image} if isinstance(image, str) else image
        detail = {"detail": image["detail"]} if image.get("detail") else {}
        return {"type": "input_image", "image_url": image["url"], **detail}
    if kind == "file":
        return input_file(part["file"])
    if kind == "refusal":
        return {"type": "input_text", "text": part["refusal"]}
    return {name: value for name, value in part.items() if name != "cache_control"}


def input_file(file: Json) -> Json:
    """A file by id, by URL or with its data; data need a name, which is made up if missing."""
    for name in ("file_id", "file_url"):
        if file.get(name):
            return {"type": "input_file", name: file[name]}
    data = file.get("file_data")
    mime = re.match(r"data:[\w.+-]+/([\w.+-]+)", data) if isinstance(data, str) else None
    name = file.get("filename") or f"file.{mime[1] if mime else 'pdf'}"
    return {"type": "input_file", "filename": name, "file_data": data}


def assistant_items(message: Json, origin: str) -> list[Json]:
    """Reasoning, then the text, then the calls of one assistant message.

    Reasoning that nothing follows is left out: it is refused without its following item.
    """
    parts = [output_part(part) for part in message_parts(message) if part.get("text") != ""]
    if isinstance(refusal := message.get("refusal"), str) and refusal:
        parts.append({"type": "refusal", "refusal": refusal})
    items = [message_item("assistant", parts)] if parts else []
    items += map(call_item, message.get("tool_calls") or ())
    return reasoning_items(message, origin) + items if items else []


def output_part(part: Json) -> Json:
    if part["type"] == "refusal":
        return {"type": "refusal", "refusal": part["refusal"]}
    # An assistant message holds nothing but text here: a picture leaves a mark.
    text = part["text"] if part["type"] == "text" else f"[{part['type']}]"
    return {"type": "output_text", "text": text}


def call_item(call: Json) -> Json:
    if call.get("type") == "custom":
        made = {"type": "custom_tool_call", "call_id": call["id"]}
        return {**made, "name": call["custom"]["name"], "input": call["custom"]["input"]}
    function = call["function"]
    arguments = function["arguments"] or "{}"
    made = {"type": "function_call", "call_id": call["id"]}
    return {**made, "name": function["name"], "arguments": arguments}


def result_item(message: Json, custom: bool) -> Json:
    """A tool's result: a text, or a list of parts where it holds more than text."""
    kind = "custom_tool_call_output" if custom else "function_call_output"
    parts = message_parts(message)
    output: str | list[Json] = message_text(message)
    failed = message.get("is_error") is True and output != MISSING_RESULT
    if any(part["type"] != "text" for part in parts):
        mark = [{"type": "input_text", "text": "[error]"}] if failed else []
        output = [*mark, *map(item_part, parts)]
    elif failed:  # this dialect has no mark for a tool that failed
        output = f"[error] {output}"
    return {"type": kind, "call_id": message["tool_call_id"], "output": output}


def reasoning_items(message: Json, origin: str) -> list[Json]:
    """The provider's own reasoning items, exactly as it made them.

    Those without encrypted content are left out: nothing is stored, so their ids mean nothing.
    """
    groups: dict[str, Json] = {}
    closed = 0  # pieces without an id belong together up to an encrypted one
    details = message.get("reasoning_details")
    for piece in details if isinstance(details, list) else ():
        if not isinstance(piece, dict) or not origin or piece.get("origin") != origin:
            continue
        id = piece.get("id") if isinstance(piece.get("id"), str) else ""
        start: Json = {"type": "reasoning", **({"id": id} if id else {}), "summary": []}
        put_piece(groups.setdefault(id or f"#{closed}", start), piece)
        closed += piece.get("type") == "reasoning.encrypted"
    return [item for item in groups.values() if item.get("encrypted_content")]


def put_piece(item: Json, piece: Json) -> None:
    kind = piece.get("type")
    if kind == "reasoning.encrypted" and isinstance(piece.get("data"), str):
        item["encrypted_content"] = piece["data"]
    elif kind == "reasoning.summary" and isinstance(piece.get("summary"), str):
        item["summary"].append({"type": "summary_text", "text": piece["summary"]})
    elif kind == "reasoning.text" and isinstance(piece.get("text"), str):
        text = {"type": "reasoning_text", "text": piece["text"]}
        item.setdefault("content", []).append(text)


def flat_tools(chat: Json, codex: bool) -> Json:
    """tools, tool_choice and parallel_tool_calls; nothing where no tool can be offered."""
    offered = list(chat.get("tools") or ())
    for at, tool in enumerate(offered):
        check_tool(tool, f"tools[{at}]")
    for at, function in enumerate(chat.get("functions") or ()):
        check_named(function, f"functions[{at}]")
        offered.append({"type": "function", "function": function})
    tools = [made for tool in offered if (made := flat_tool(tool))]
    if not tools:
        return {}
    choice = chat.get("tool_choice") or chat.get("function_call")
    parallel = chat.get("parallel_tool_calls")
    members: Json = {"tools": tools}
    if choice or codex:
        members["tool_choice"] = flat_choice(choice or "auto")
    if parallel is not None or codex:
        members["parallel_tool_calls"] = parallel is not False
    return members


def flat_tool(tool: Json) -> Json | None:
    """A tool with its members at the top; None for one that this dialect does not know."""
    kind = tool.get("type") or "function"
    if kind == "function":
        return flat_function(tool["function"])
    if kind == "custom":
        return flat_custom(tool["custom"])
    if kind not in HOSTED_TOOLS:
        return None
    return {name: value for name, value in tool.items() if name != "cache_control"}


def flat_function(function: Json) -> Json:
    """`strict` is always told: here it is true unless it says false, in a chat the reverse."""
    return {
        "type": "function",
        "name": function["name"],
        "description": function.get("description") or "",
        "strict": function.get("strict") is True,
        "parameters": function.get("parameters") or {"type": "object", "properties": {}},
    }


def flat_custom(custom: Json) -> Json:
    """A free-text tool; a chat keeps the grammar of its format one level deeper."""
    made = {name: custom[name] for name in ("name", "description") if custom.get(name)}
    shape = custom.get("format")
    if isinstance(shape, dict) and isinstance(shape.get("grammar"), dict):
        shape = {"type": "grammar", **shape["grammar"]}
    return {"type": "custom", **made, **({"format": shape} if shape else {})}


def flat_choice(choice: Any) -> Any:
    """{type: function, function: {name}} as {type: function, name}; words as they are."""
    if not isinstance(choice, dict):
        return choice
    kind = choice.get("type") or "function"
    inner = choice.get(kind) if isinstance(kind, str) else None
    if not isinstance(inner, dict):
        return {"type": kind, **choice}
    if kind != "allowed_tools":
        return {"type": kind, "name": inner.get("name")}
    tools = inner.get("tools")
    return {
        "type": kind,
        "mode": inner.get("mode") or "auto",
        "tools": [flat_choice(tool) for tool in tools if tool] if isinstance(tools, list) else [],
    }


def text_member(chat: Json) -> Json:
    """`text`: the wanted format and how wordy the answer may be."""
    text: Json = {}
    wanted = chat.get("response_format") or {}
    schema = wanted.get("json_schema")
    if wanted.get("type") == "json_schema" and isinstance(schema, dict):
        named = {"type": "json_schema", "name": schema.get("name") or "answer"}
        text["format"] = {**{k: v for k, v in schema.items() if v is not None}, **named}
    elif wanted.get("type") == "json_object":
        text["format"] = {"type": "json_object"}
    if isinstance(chat.get("verbosity"), str):
        text["verbosity"] = chat["verbosity"]
    return {"text": text} if text else {}


def reasoning_wish(chat: Json, codex: bool) -> Json:
    """How hard to think, a summary to read, and the encrypted original to send back."""
    made: Json = {"include": ["reasoning.encrypted_content"]}
    effort = chat.get("reasoning_effort") or ("medium" if codex else "")
    if effort:
        summary = {} if effort == "none" else {"summary": "auto"}
        made["reasoning"] = {"effort": RESPONSE_EFFORTS.get(effort, effort), **summary}
    return made


@dataclass(frozen=True)
class ItemText:
    """One kind of text: in which item it stands, and which events bring it piece by piece."""

    item: str  # type of the item
    field: str  # what the reader makes of it
    whole: str  # member of the `done` event that repeats all of it
    part: str = ""  # member that numbers the parts of an item


ITEM_TEXTS: Final[Mapping[str, ItemText]] = {
    "response.output_text": ItemText("message", "content", "text", "content_index"),
    "response.refusal": ItemText("message", "refusal", "refusal", "content_index"),
    "response.reasoning_summary_text": ItemText("reasoning", "summary", "text", "summary_index"),
    "response.reasoning_text": ItemText("reasoning", "text", "text", "content_index"),
    "response.function_call_arguments": ItemText("function_call", "call", "arguments"),
    "response.custom_tool_call_input": ItemText("custom_tool_call", "call", "input"),
}
# Items that are calls: (type and member of a chat's call, member that holds the text).
CALL_ITEMS: Final[Mapping[str, tuple[str, str]]] = {
    "function_call": ("function", "arguments"),
    "custom_tool_call": ("custom", "input"),
}
READ_ITEMS: Final = frozenset({"message", "reasoning", *CALL_ITEMS})
PART_FIELDS: Final[Mapping[str, str]] = {
    "output_text": "content",
    "text": "content",
    "refusal": "refusal",
    "summary_text": "summary",
    "reasoning_text": "text",
}
# Events that end an answer -> the status they stand for.
RESPONSE_ENDINGS: Final[Mapping[str, str]] = {
    "response.completed": "completed",
    "response.incomplete": "incomplete",
    "response.failed": "failed",
    "response.cancelled": "cancelled",
}
RESPONSE_ENDING_BYTES: Final = tuple(name.encode() for name in RESPONSE_ENDINGS)
# The HTTP status an error inside a 200 stands for.
RESPONSE_ERRORS: Final[Mapping[str, int]] = {
    "rate_limit_exceeded": 429,
    "usage_limit_reached": 429,
    "insufficient_quota": 429,
    "server_is_overloaded": 503,
    "slow_down": 503,
    "server_error": 500,
    "context_length_exceeded": 400,
    "model_not_found": 404,
}


@dataclass
class OutputItem:
    """One item of an answer, and what of it was passed on."""

    kind: str
    id: str = ""
    index: int | None = None
    sent: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    call: int = -1  # its number among the calls; -1 = its name is not known yet
    shown: str = ""  # of summary and text, that which is read: one often repeats the other
    given: set[str] = field(default_factory=set)


class ResponsesReader:
    """Events of a Responses stream to canonical chunks; nothing is ever given twice.

    The same text comes up to four times: as deltas, in `done`, in the finished item and in the
    final response, and any of them may be missing. Each place remembers what it has sent.
    Reasoning is passed on as it comes in `reasoning_content`; `reasoning_details` comes in
    whole pieces with the finished item, as the encrypted content of an item that has only
    begun is another one (seen 2026-09).
    """

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.finished = False
        self._head: Json = {"id": "", "object": "chat.completion.chunk", "created": 0, "model": ""}
        self._items: list[OutputItem] = []
        self._by_id: dict[str, OutputItem] = {}
        self._by_index: dict[int, OutputItem] = {}
        self._calls = 0
        self._said: set[str] = set()  # content, reasoning, role: what has begun

    def feed(self, event: Json) -> list[Json]:
        """The chunks that one event makes; an error becomes [{"error": {...}}]."""
        if self.finished or not isinstance(event, dict):
            return []
        kind = text_or_empty(event.get("type"))
        stem, _, end = kind.rpartition(".")
        if stem in ITEM_TEXTS and end in ("delta", "done"):
            return self._piece(ITEM_TEXTS[stem], event, end == "done")
        if kind in ("response.output_item.added", "response.output_item.done"):
            return self._item_event(event, end == "done")
        if kind in RESPONSE_ENDINGS:
            return self._end(event.get("response"), RESPONSE_ENDINGS[kind])
        if event.get("object") == "response":
            return self._end(event, "")
        if kind == "error" or event.get("error") or (not kind and event.get("detail")):
            return self._fail(event.get("error") or event)
        self._note(event.get("response"))
        return []

    def finish(self) -> list[Json]:
        """Nothing is held back that could still be used: a call without a name is no call."""
        return []

    def _note(self, response: object) -> None:
        """Who answers: known from the first events, or only from the last."""
        if isinstance(response, dict):
            self._head["id"] = text_or_empty(response.get("id")) or self._head["id"]
            self._head["model"] = text_or_empty(response.get("model")) or self._head["model"]
            created = response.get("created_at")
            if isinstance(created, (int, float)) and is_number(created):
                self._head["created"] = int(created)

    def _chunk(self, delta: Json, finish: str | None = None) -> Json:
        if "role" not in self._said:
            self._said.add("role")
            delta = {"role": "assistant", **delta}
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return {**self._head, "choices": [choice]}

    def _piece(self, flow: ItemText, event: Json, whole: bool) -> list[Json]:
        text = event.get(flow.whole if whole else "delta")
        if not isinstance(text, str):
            return []
        item = self._find(flow.item, text_or_empty(event.get("item_id")), event.get("output_index"))
        part = event.get(flow.part)
        return self._say(item, flow.field, part if type(part) is int else 0, text, whole)

    def _item_event(self, event: Json, done: bool) -> list[Json]:
        raw = event.get("item")
        if not isinstance(raw, dict) or text_or_empty(raw.get("type")) not in READ_ITEMS:
            return []
        id, at = text_or_empty(raw.get("id")), event.get("output_index")
        item = self._find(raw["type"], id, at, done)
        # A call that only begins may show arguments which its deltas then repeat.
        return self._settle(item, raw) if done else self._open(item, raw)

    def _find(self, kind: str, id: str, index: object, known: bool = True) -> OutputItem:
        """The item that an event is about, made if it is new.

        Some copies change the id with each event, some give one id or index to all: the item
        with both is right, then that with the index. `known` = False: the event begins an item.
        """
        at = index if type(index) is int else None
        by_id = self._by_id.get(id)
        by_index = self._by_index.get(at) if at is not None else None
        if by_id and by_id.kind == kind and at in (None, by_id.index):
            return by_id
        if known and not id and at is None:
            by_index = next((i for i in reversed(self._items) if i.kind == kind), None)
        for item in (by_index, by_id) if known else ():
            if item and item.kind == kind:
                return item
        return self._new(kind, id, at)

    def _new(self, kind: str, id: str, index: int | None) -> OutputItem:
        item = OutputItem(kind, id, index)
        self._items.append(item)
        if id:
            self._by_id[id] = item
        if index is not None:
            self._by_index[index] = item
        return item

    def _say(self, item: OutputItem, name: str, part: int, text: str, whole: bool) -> list[Json]:
        """The chunk for what is new in a text; `whole` = it repeats all that came before."""
        first = (name, part) not in item.sent
        sent = item.sent.setdefault((name, part), [])
        if whole:
            before = "".join(sent)
            # Not so when the stream began in its middle: then what was sent has to do.
            text = text[len(before) :] if text.startswith(before) else ""
        if not text:
            if first:
                del item.sent[name, part]
            return []
        sent.append(text)
        if name == "call":
            return self._argue(item, text)
        if name == "refusal":
            return [self._chunk({"refusal": text})]
        if name == "content":
            return [self._chunk({"content": self._gap(item, "content", "read") + text})]
        if item.shown not in ("", name):
            return []
        item.shown = name
        return [self._chunk({"reasoning_content": self._gap(item, "reasoning", str(part)) + text})]

    def _gap(self, item: OutputItem, stream: str, part: str) -> str:
        """A blank line between two messages, or two parts of a summary, that become one text."""
        fresh = part not in item.given
        item.given.add(part)
        begun = stream in self._said
        self._said.add(stream)
        return "\n\n" if fresh and begun else ""

    def _argue(self, item: OutputItem, text: str) -> list[Json]:
        if item.call < 0:
            return []  # kept in item.sent until the name is known
        kind, member = CALL_ITEMS[item.kind]
        return [self._chunk({"tool_calls": [{"index": item.call, kind: {member: text}}]})]

    def _open(self, item: OutputItem, raw: Json) -> list[Json]:
        """The first delta of a call: its number, id, name, and arguments that came too early."""
        name = text_or_empty(raw.get("name"))
        if item.kind not in CALL_ITEMS or item.call >= 0 or not name:
            return []
        item.call, self._calls = self._calls, self._calls + 1
        id = text_or_empty(raw.get("call_id")) or text_or_empty(raw.get("id"))
        kind, member = CALL_ITEMS[item.kind]
        call = {
            "index": item.call,
            "id": id or f"call_{item.call}",
            "type": kind,
            kind: {"name": name, member: "".join(item.sent.get(("call", 0), ()))},
        }
        return [self._chunk({"tool_calls": [call]})]

    def _settle(self, item: OutputItem, raw: Json) -> list[Json]:
        """What a finished item holds beyond what was sent of it."""
        if item.kind in CALL_ITEMS:
            text = raw.get(CALL_ITEMS[item.kind][1])
            text = dump_json(text).decode() if isinstance(text, dict) else text_or_empty(text)
            return self._open(item, raw) + self._say(item, "call", 0, text, True)
        chunks: list[Json] = []
        for name in ("summary", "content"):
            for at, part in enumerate(objects_in(raw.get(name))):
                place = PART_FIELDS.get(text_or_empty(part.get("type")), "")
                text = part.get("refusal") if place == "refusal" else part.get("text")
                if place and isinstance(text, str):
                    chunks += self._say(item, place, at, text, True)
        return chunks + self._extras(item, raw)

    def _extras(self, item: OutputItem, raw: Json) -> list[Json]:
        """Reasoning to send back, and the sources of a text: once for each item."""
        if item.kind == "message":
            found, name = message_annotations(raw), "annotations"
        else:
            found, name = item_reasoning(raw, self.origin), "reasoning_details"
        new = [piece for piece in found if piece["type"] not in item.given]
        item.given |= {piece["type"] for piece in new}
        return [self._chunk({name: new})] if new else []

    def _end(self, response: object, status: str) -> list[Json]:
        """The end: what only the final response holds, the finish reason, usage."""
        response = response if isinstance(response, dict) else {}
        self._note(response)
        status = status or text_or_empty(response.get("status"))
        if status in ("failed", "cancelled") or response.get("error"):
            return self._fail(response.get("error") or {"code": status or "failed"})
        chunks: list[Json] = []
        for item, raw in self._final_items(response):
            chunks += self._settle(item, raw)
        self.finished = True
        chunks.append(self._chunk({}, self._finish_reason(response, status)))
        if usage := responses_usage(response.get("usage")):
            chunks.append({**self._head, "choices": [], "usage": usage})
        return chunks

    def _final_items(self, response: Json) -> Iterator[tuple[OutputItem, Json]]:
        """Each item of the final output with the one it was in the stream.

        By id; where the ids are all new ones, the n-th of a kind is the n-th that came.
        """
        output = objects_in(response.get("output"))
        raws = [raw for raw in output if text_or_empty(raw.get("type")) in READ_ITEMS]
        by_id = {i.id: i for i in self._items if i.id}
        same_ids = any(text_or_empty(raw.get("id")) in by_id for raw in raws)
        left = list(self._items)
        for raw in raws:
            item = by_id.pop(text_or_empty(raw.get("id")), None)
            if item is None and not same_ids:
                item = next((i for i in left if i.kind == raw["type"]), None)
            if item in left:
                left.remove(item)
            yield item or self._new(raw["type"], text_or_empty(raw.get("id")), None), raw

    def _finish_reason(self, response: Json, status: str) -> str:
        if status == "incomplete":
            details = response.get("incomplete_details")
            reason = details.get("reason") if isinstance(details, dict) else ""
            return "content_filter" if reason == "content_filter" else "length"
        return "tool_calls" if self._calls else "stop"

    def _fail(self, error: object) -> list[Json]:
        self.finished = True
        return [{"error": stream_error(error)}]


def text_or_empty(value: object) -> str:
    return value if isinstance(value, str) else ""


def objects_in(value: object) -> list[Json]:
    """The objects of a list; [] for what is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def item_reasoning(raw: Json, origin: str) -> list[Json]:
    """A reasoning item as pieces to send back: readable ones first, then the encrypted one.

    Parts after the first are numbered, so that nobody takes them for one text.
    """
    id = {"id": raw["id"]} if text_or_empty(raw.get("id")) else {}
    pieces: list[Json] = []
    for part in objects_in(raw.get("summary")) + objects_in(raw.get("content")):
        name = "summary" if part.get("type") == "summary_text" else "text"
        if text := text_or_empty(part.get("text")):
            index = {"index": len(pieces)} if pieces else {}
            piece = {"type": f"reasoning.{name}", name: text, **id, **index, "origin": origin}
            pieces.append(piece)
    if data := text_or_empty(raw.get("encrypted_content")):
        pieces.append({"type": "reasoning.encrypted", "data": data, **id, "origin": origin})
    return pieces


def message_annotations(raw: Json) -> list[Json]:
    """Citations of a message, nested as in a chat: {type, url_citation: {...}}."""
    made = []
    for part in objects_in(raw.get("content")):
        for note in objects_in(part.get("annotations")):
            kind = text_or_empty(note.get("type"))
            inner = {name: value for name, value in note.items() if name != "type"}
            if kind == "url_citation":
                made.append({"type": kind, kind: inner})
    return made


def responses_usage(usage: object) -> Json | None:
    """Token counts in a chat's words; a total that was given is never recomputed."""
    if not isinstance(usage, dict):
        return None
    asked, made = count_in(usage, "input_tokens"), count_in(usage, "output_tokens")
    total = usage.get("total_tokens")
    before, after = usage.get("input_tokens_details"), usage.get("output_tokens_details")
    cached: Json = {"cached_tokens": count_in(before, "cached_tokens")}
    if written := count_in(before, "cache_write_tokens"):
        cached["cache_creation_tokens"] = written
    return {
        "prompt_tokens": asked,
        "completion_tokens": made,
        "total_tokens": total if is_integer(total) else asked + made,
        "prompt_tokens_details": cached,
        "completion_tokens_details": {"reasoning_tokens": count_in(after, "reasoning_tokens")},
    }


def count_in(counts: object, name: str) -> int:
    value = counts.get(name) if isinstance(counts, dict) else 0
    return value if type(value) is int and value > 0 else 0


def stream_error(error: object) -> Json:
    """{message, type, code} of an error event, with the `status` that its code stands for."""
    inner = error if isinstance(error, dict) else {"message": error}
    kind = text_or_empty(inner.get("type"))
    kind = "" if kind == "error" else kind
    code = text_or_empty(inner.get("code")) or kind
    text = text_or_empty(inner.get("message")) or text_or_empty(inner.get("detail"))
    made: Json = {
        "message": scrub(text or code or "the provider failed without a reason"),
        "type": kind or "server_error",
        "code": code or None,
    }
    stated = inner.get("status") or inner.get("status_code")
    status = stated if is_integer(stated) else RESPONSE_ERRORS.get(code)
    if status or code.startswith("invalid_"):
        made["status"] = status or 400
    if is_number(inner.get("resets_in_seconds")):
        made["resets_in_seconds"] = inner["resets_in_seconds"]
    return made


def responses_reply_to_chat(reply: Json, origin: str) -> Json:
    """A whole Responses answer as a chat reply; {"error": {...}} for one that failed."""
    return gathered_reply(ResponsesReader(origin).feed({"object": "response", **reply}))


def responses_events_to_reply(events: Iterable[Json], origin: str) -> Json:
    """The whole reply of a stream (Codex only streams); {"error": ...} if it broke off."""
    reader = ResponsesReader(origin)
    chunks = [chunk for event in events for chunk in reader.feed(event)]
    if not reader.finished:
        broken = {"message": "the stream ended before its last event", "code": "truncated"}
        return {"error": {**broken, "type": "server_error", "status": 502}}
    return gathered_reply(chunks)


def only_content_responses(block: bytes) -> bool:
    """Whether a block of whole events surely holds no end, no error and no usage.

    Every `data:` must hold an event of this dialect, and none of them one that ends it. A few
    fast searches, as in only_content; when in doubt the answer is no.
    """
    count = block.count
    lines = block.startswith(b"data:") + count(b"\ndata:")
    if b"\r" in block:
        lines += count(b"\rdata:")
    typed = count(b'"type":"response.')
    if typed != lines:  # [DONE], a bare error, or an event that is written with spaces
        typed += count(b'"type": "response.')
    return (
        typed == lines
        and not any(ending in block for ending in RESPONSE_ENDING_BYTES)
        and (b'"error"' not in block or only_null(block, b"error"))
        and (b'"usage"' not in block or only_null(block, b"usage"))
    )


def only_null(block: bytes, name: bytes) -> bool:
    """Whether a member is null wherever it stands."""
    count = block.count
    missing = count(b'"%b"' % name) - count(b'"%b":null' % name)
    return not missing or missing == count(b'"%b": null' % name)


def own_reasoning(body: Json, origin: str) -> Json | None:
    """The edit {"input": [...]} that a Responses client's body needs; None = send it as it is.

    Sealed content of this provider is unsealed; items sealed for another one are left out, as
    nobody else can read them. What was never sealed stays: it came from a native answer.
    """
    items = body.get("input")
    if not isinstance(items, list) or not any(map(is_sealed_item, items)):
        return None
    kept = (unsealed_item(item, origin) if is_sealed_item(item) else item for item in items)
    return {"input": [item for item in kept if item is not None]}


def unsealed_item(item: Json, origin: str) -> Json | None:
    """A sealed item as the provider made it; None if another one did, or nothing is in it.

    A seal holds the encrypted content itself, or "p.<mark>.<JSON>" with the pieces of
    reasoning that an answer in the Responses dialect was made from.
    """
    source, value = unseal(item["encrypted_content"])
    if source != origin or not value:
        return None
    pieces = read_json(value[2:].partition(".")[2].encode()) if value.startswith("p.") else None
    if not isinstance(pieces, list):
        return {**item, "encrypted_content": value}
    parts = objects_in(item.get("summary"))
    shown = "\n\n".join(text for part in parts if (text := text_or_empty(part.get("text"))))
    blank = {"reasoning.summary": {"summary": shown}, "reasoning.text": {"text": shown}}
    told = ({k: v for k, v in piece.items() if v is not None} for piece in objects_in(pieces))
    details = [{**blank.get(str(p.get("type")), {}), **p, "origin": origin} for p in told]
    return next(iter(reasoning_items({"reasoning_details": details}, origin)), None)


def is_sealed_item(item: object) -> bool:
    content = item.get("encrypted_content") if isinstance(item, dict) else None
    return isinstance(content, str) and content.startswith(SEAL)


# =============================================================================
# 17. Completions
# =============================================================================

# The legacy endpoint, for clients that still ask for text_completion: the prompt becomes one
# user message. Field by field as in the openai SDK 3.54 (seen 2026-11).

COMPLETION_REFUSED: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "suffix": (bool, "text cannot be filled in before a suffix by chat models"),
    "echo": (bool, "the prompt cannot be given back with the answer"),
    "logprobs": (is_integer, "log probabilities are not available"),
    "tools": (bool, "tools need /v1/chat/completions"),
    "functions": (bool, "functions need /v1/chat/completions"),
}
COMPLETION_ONLY = ("prompt", "suffix", "echo", "logprobs", "best_of", "messages", "tool_choice")
COMPLETION_FINISHES = frozenset(("stop", "length", "content_filter"))


def completions_to_chat(body: Mapping[str, Any]) -> Json:
    """The chat body for a legacy completion. Other fields pass; max_tokens has no default here.

    One prompt only: a string, or a list of one string. Raises BadRequest with the field's name.
    """
    prompt = completion_prompt(body.get("prompt"))
    for name, (asks, why) in COMPLETION_REFUSED.items():
        if asks(body.get(name)):
            raise BadRequest(f"{name} is not supported: {why}", param=name)
    fields = {k: v for k, v in body.items() if k not in COMPLETION_ONLY}
    check_fields(fields, CHAT_FIELDS)
    best_of = body.get("best_of")
    if best_of is not None and best_of != (body.get("n") or 1):
        message = "best_of is not supported: ask for n answers and choose among them"
        raise BadRequest(message, param="best_of")
    return {**fields, "messages": [{"role": "user", "content": prompt}]}


def completion_prompt(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise invalid("prompt", "a string or a list of one string", prompt)
    if not all(isinstance(text, str) for text in prompt):
        message = "prompt must be text: tokens mean something else to every model"
        raise BadRequest(message, param="prompt")
    if len(prompt) > 1:
        message = f"prompt holds {len(prompt)} texts: send one request for each"
        raise BadRequest(message, param="prompt")
    return str(prompt[0])


def completion_finish(reason: object) -> str:
    return str(reason) if reason in COMPLETION_FINISHES else "stop"


def completion_choice(index: object, text: str, finish: str | None) -> Json:
    return {"text": text, "index": index or 0, "logprobs": None, "finish_reason": finish}


def spoken_text(message: Any) -> str:
    """Text and refusal of a message or delta; the format has no place for reasoning."""
    if not isinstance(message, dict):
        return ""
    return f"{message.get('content') or ''}{message.get('refusal') or ''}"


def completion_head(opening: Opening, model: object) -> Json:
    return {
        "id": f"cmpl-{opening.id}",
        "object": "text_completion",
        "created": opening.created,
        "model": opening.model or str(model or ""),
    }


def chat_reply_to_completion(reply: Json, opening: Opening) -> Json:
    """The text_completion for a whole canonical reply."""
    choices = [
        completion_choice(
            choice.get("index"),
            spoken_text(choice.get("message")),
            completion_finish(choice.get("finish_reason")),
        )
        for choice in reply.get("choices") or ()
    ]
    usage = {"usage": reply["usage"]} if reply.get("usage") else {}
    return {**completion_head(opening, reply.get("model")), "choices": choices, **usage}


class CompletionsWriter:
    """Canonical chunks in, text_completion chunks out; usage only if the client asked for it."""

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        options = opening.request.get("stream_options")
        self._tells_usage = isinstance(options, dict) and options.get("include_usage") is True
        self._head: Json = {}
        self._usage: Json | None = None
        self._finishes: dict[int, str] = {}
        self._ended = False

    def feed(self, chunk: Json) -> bytes:
        """The events for one canonical chunk; the finish of each choice is held to the end."""
        if self._ended:
            return b""
        self._head = self._head or completion_head(self._opening, chunk.get("model"))
        self._usage = chunk.get("usage") or self._usage
        texts = []
        for choice in chunk.get("choices") or ():
            index = choice.get("index") or 0
            self._finishes[index] = choice.get("finish_reason") or self._finishes.get(index, "")
            if text := spoken_text(choice.get("delta")):
                texts.append(completion_choice(index, text, None))
        return self._event(texts) if texts else b""

    def finish(self) -> bytes:
        """Finish reasons, usage if asked for, and [DONE]."""
        if self._ended:
            return b""
        self._ended = True
        self._head = self._head or completion_head(self._opening, "")
        ends = sorted((self._finishes or {0: ""}).items())
        last = [completion_choice(index, "", completion_finish(why)) for index, why in ends]
        usage = b""
        if self._tells_usage and self._usage:
            usage = encode_event({**self._head, "choices": [], "usage": self._usage})
        return self._event(last) + usage + DONE

    def fail(self, error: RouterError) -> bytes:
        """The error, and no [DONE] after it."""
        if self._ended:
            return b""
        self._ended = True
        return encode_event(error_body(error))

    def beat(self) -> bytes:
        return b"" if self._ended else b": keep-alive\n\n"

    def _event(self, choices: list[Json]) -> bytes:
        usage = {"usage": None} if self._tells_usage else {}
        return encode_event({**self._head, "choices": choices, **usage})


# =============================================================================
# 18. Dialects
# =============================================================================


def only_content(block: bytes) -> bool:
    """Whether a block of chat events is sound and surely holds no more than text.

    No error, finish, usage, tool call or end, and nothing that looks like a broken chunk. A few
    fast searches for a whole block: a pattern that stops at every quote costs ten times as much,
    parsing fifty times. When in doubt the answer is no, and each event is looked at.
    """
    count = block.count
    return (
        count(b'data: {"') == count(b"}\n\n")
        and (
            count(b'"finish_reason"') == count(b'"finish_reason":null')
            or only_null(block, b"finish_reason")
        )
        and b'"error"' not in block
        and (b'"usage"' not in block or only_null(block, b"usage"))
        and (b'"tool_calls"' not in block or only_null(block, b"tool_calls"))
        and b"[DONE]" not in block
        and b"event:" not in block
        and b'"x_groq"' not in block
        and count(b"{") == count(b"}")
        and not count(b'"') & 1
    )


class Sight(NamedTuple):
    """What one event of a provider's stream tells."""

    sign: Sign = ""
    error: Outcome | None = None
    tokens: Tokens | None = None
    finished: bool = False  # how the answer ended is stated
    done: bool = False  # nothing comes after it
    only_usage: bool = False
    odd: bool = False  # in an accent that would confuse the client
    calls: bool = False  # part of a tool call
    broken: bool = False  # no JSON: not passed on
    final: Json | None = None  # the whole answer once more


def see_chat(data: bytes) -> Sight:
    if data == b"[DONE]":
        return Sight("empty finish", finished=True, done=True)
    chunk = read_json(data)
    if error := embedded_error(chunk):
        return Sight(error=error)
    if not isinstance(chunk, dict):
        return Sight(broken=True)
    choices = chunk.get("choices")
    listed = choices if isinstance(choices, list) else ()
    finished = any(isinstance(c, dict) and c.get("finish_reason") for c in listed)
    only_usage = choices == [] and bool(chunk.get("usage"))
    sign = chunk_sign(chunk)
    odd, calls = bool(sign) and needs_reading(chunk), has_calls(chunk)
    return Sight(
        sign, None, tokens_of(chunk), finished, only_usage=only_usage, odd=odd, calls=calls
    )


def has_calls(chunk: Json) -> bool:
    """Does this chunk hold a part of a tool call?"""
    choices = chunk.get("choices")
    listed = choices if isinstance(choices, list) else ()
    deltas = (choice.get("delta") for choice in listed if isinstance(choice, dict))
    return any(isinstance(d, dict) and bool(d.get("tool_calls")) for d in deltas)


# What a finished Messages stream may say without a word of content.
TELLING_STOPS: Final = frozenset({"refusal", "max_tokens", "model_context_window_exceeded"})


def see_messages(data: bytes) -> Sight:
    event = read_json(data)
    if error := embedded_error(event):
        return Sight(error=error)
    if not isinstance(event, dict):
        return Sight(broken=True)
    kind, tokens = event.get("type"), messages_tokens(event)
    if kind == "message_delta":
        delta = event.get("delta")
        stop = delta.get("stop_reason") if isinstance(delta, dict) else None
        telling: Sign = "finish" if stop in TELLING_STOPS else "empty finish"
        return Sight(telling if stop else "", None, tokens, bool(stop))
    part = event.get("delta") if kind == "content_block_delta" else event.get("content_block")
    useful = isinstance(part, dict) and any(
        name != "type" and value for name, value in part.items()
    )
    calls = isinstance(part, dict) and part.get("type") in ("tool_use", "input_json_delta")
    done = kind == "message_stop"
    return Sight("useful" if useful else "", None, tokens, done=done, calls=calls)


def see_responses(data: bytes) -> Sight:
    if data == b"[DONE]":
        return Sight()
    event = read_json(data)
    kind = event.get("type") if isinstance(event, dict) else None
    if not isinstance(kind, str):
        error = embedded_error(event)
        return Sight(error=error) if error else Sight(broken=not isinstance(event, dict))
    whole = event.get("response")
    whole = whole if isinstance(whole, dict) else {}
    if kind in ("error", "response.failed", "response.cancelled"):
        problem = stream_error(whole.get("error") or event.get("error") or event)
        return Sight(error=embedded_error({"error": problem}) or BROKEN)
    if kind in ("response.completed", "response.incomplete"):
        said = bool(whole.get("output")) or kind == "response.incomplete"
        tokens = tokens_of({"usage": responses_usage(whole.get("usage"))})
        sign: Sign = "finish" if said else "empty finish"
        return Sight(sign, None, tokens, True, True, final=whole)
    useful = kind.endswith(".delta") and bool(event.get("delta"))
    made = event.get("item") if kind == "response.output_item.done" else None
    useful = useful or (isinstance(made, dict) and made.get("type") != "reasoning")
    return Sight("useful" if useful else "")


def judge_embeddings(body: bytes) -> tuple[Outcome | None, Json]:
    reply = read_json(body)
    error = embedded_error(reply)
    if error:
        return error, {}
    if isinstance(reply, dict) and isinstance(reply.get("data"), list) and reply["data"]:
        return None, reply
    return Outcome(0, f"no embeddings in the answer: {error_text(body)[:200]}", "garbled"), {}


def judge_messages(body: bytes) -> tuple[Outcome | None, Json]:
    return judge_translated(
        body, lambda reply: messages_reply_to_chat(reply, ""), "type", "message"
    )


def judge_responses(body: bytes) -> tuple[Outcome | None, Json]:
    return judge_translated(
        body, lambda reply: responses_reply_to_chat(reply, ""), "object", "response"
    )


def judge_translated(
    body: bytes, translate: Callable[[Json], Json], member: str, kind: str
) -> tuple[Outcome | None, Json]:
    """(what is wrong with a whole answer of another dialect or None, the parsed answer)."""
    reply = read_json(body)
    if not body.strip():
        return Outcome(0, "an empty body", "empty"), {}
    if not isinstance(reply, dict) or reply.get(member) != kind:
        error = embedded_error(reply)
        return error or Outcome(0, f"not a {kind}: {error_text(body)[:200]}", "garbled"), {}
    chat = translate(reply)
    if error := embedded_error(chat):
        return error, {}
    if any(answers(choice) for choice in chat.get("choices") or ()):
        return None, reply
    return Outcome(0, "an answer without content", "empty"), {}


class Reader(Protocol):
    """A provider's stream -> canonical chunks."""

    finished: bool

    def feed(self, event: Json) -> list[Json]: ...
    def finish(self) -> list[Json]: ...


class Writer(Protocol):
    """Canonical chunks -> a client's stream."""

    def feed(self, chunk: Json) -> bytes: ...
    def finish(self) -> bytes: ...
    def fail(self, error: RouterError) -> bytes: ...
    def beat(self) -> bytes: ...


SEQUENCE: Final = re.compile(rb'"sequence_number"\s*:\s*(\d+)')


BEGINNINGS: Final = {"response.created": "response", "response.output_item.added": "item"}


def last_number(events: bytes) -> int:
    return max(map(int, SEQUENCE.findall(events)), default=-1)


def ids_in(events: bytes) -> list[bytes]:
    """The ids of a Response and of its items, in the order they began."""
    found = []
    for event in split_events(events):
        value = read_json(event_data(event))
        kind = value.get("type") if isinstance(value, dict) else None
        begun = BEGINNINGS.get(kind) if isinstance(kind, str) else None
        holder = value.get(begun) if begun else None
        if isinstance(holder, dict) and isinstance(holder.get("id"), str):
            found.append(holder["id"].encode())
    return found


def broken_response(first: bytes, last: bytes, error: RouterError) -> bytes:
    """`response.failed` for a Response that began as `first` and came as far as `last`."""
    events = (read_json(event_data(event)) for event in split_events(first))
    begun: Json = next(
        (e["response"] for e in events if isinstance(e, dict) and "response" in e), {}
    )
    number = last_number(last) + 1
    failure = {**begun, "status": "failed", "error": failure_of(error)}
    event = {"type": "response.failed", "sequence_number": number, "response": failure}
    return b"event: response.failed\n" + encode_event(event)


@dataclass(frozen=True)
class Dialect:
    """A language that providers speak."""

    name: str
    path: str  # below a provider's base URL
    judge: Callable[[bytes], tuple[Outcome | None, Json]]  # a whole answer: (problem, reply)
    reader: Callable[[str, Json], Reader]  # for a provider's answer to a chat
    canonical: Callable[[Json, str, Json], Json]  # a whole answer made canonical
    only_content: Callable[[bytes], bool] = only_content
    see: Callable[[bytes], Sight] = see_chat
    closing: bytes = DONE  # what a stream ends with
    last: frozenset[str] = frozenset()  # types of the events that end a stream
    # (how the stream began, what was passed on last, why) -> the end of one that breaks
    broken: Callable[[bytes, bytes, RouterError], bytes] = lambda _first, _last, error: (
        encode_event(error_body(error))
    )


MESSAGE_STOP: Final = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'

IN_CHAT: Final[tuple[Callable[[str, Json], Reader], Callable[[Json, str, Json], Json]]] = (
    lambda origin, _chat: ChatReader(origin),
    lambda reply, origin, _chat: canonical_reply(reply, origin),
)

IN_RESPONSES: Final[tuple[Callable[[str, Json], Reader], Callable[[Json, str, Json], Json]]] = (
    lambda origin, _chat: ResponsesReader(origin),
    lambda reply, origin, _chat: responses_reply_to_chat(reply, origin),
)
RESPONSE_LAST: Final = frozenset(RESPONSE_ENDINGS)

DIALECTS: Final = {
    row.name: row
    for row in (
        Dialect("chat", "/chat/completions", judge_reply, *IN_CHAT),
        Dialect(
            "messages",
            "/messages",
            judge_messages,
            MessagesReader,
            messages_reply_to_chat,
            only_content_messages,
            see_messages,
            MESSAGE_STOP,
            frozenset({"message_stop"}),
            lambda _first, _last, error: messages_event(messages_error(error)),
        ),
        Dialect(
            "responses",
            "/responses",
            judge_responses,
            *IN_RESPONSES,
            only_content_responses,
            see_responses,
            b"",
            RESPONSE_LAST,
            broken_response,
        ),
        Dialect("embeddings", "/embeddings", judge_embeddings, *IN_CHAT),
        # ChatGPT's backend only streams, and its last event does not repeat the answer: it is
        # never handed on as it came.
        Dialect("codex", "/responses", judge_responses, *IN_RESPONSES, last=RESPONSE_LAST),
    )
}


PIECE_NAMES: Final = ("origin", "id", "format")


class ChatWriter:
    """Canonical chunks for a client that speaks Chat.

    Its SDK puts deltas together member by member: what is in a list needs an `index`, and text
    of equal index is joined, so that a name must come once.
    """

    def __init__(self, opening: Opening, _origin: str) -> None:
        options = opening.request.get("stream_options") or {}
        self._wants_usage = bool(options.get("include_usage"))
        self._usage: Json | None = None
        self._pieces: set[int] = set()  # of reasoning, by index
        self._head = {
            "id": f"chatcmpl-{opening.id}",
            "object": "chat.completion.chunk",
            "created": opening.created,
            "model": opening.model,
        }

    def feed(self, chunk: Json) -> bytes:
        self._usage = chunk.get("usage") or self._usage
        self._head |= chat_head(chunk)
        choices = [{"finish_reason": None, **choice} for choice in chunk.get("choices") or ()]
        for choice in choices:
            if pieces := choice.get("delta", {}).get("reasoning_details"):
                choice["delta"] = {**choice["delta"], "reasoning_details": self._indexed(pieces)}
        return encode_event({**self._head, "choices": choices}) if choices else b""

    def _indexed(self, pieces: list[Json]) -> list[Json]:
        """Pieces of reasoning with an index; what names one stands in its first delta only."""
        made = []
        for piece in pieces:
            index = piece.get("index")
            first = not isinstance(index, int) or index not in self._pieces
            index = index if isinstance(index, int) else len(self._pieces)
            self._pieces.add(index)
            named = piece if first else {k: v for k, v in piece.items() if k not in PIECE_NAMES}
            made.append({**named, "index": index})
        return made

    def finish(self) -> bytes:
        if not (self._wants_usage and self._usage):
            return DONE
        return encode_event({**self._head, "choices": [], "usage": self._usage}) + DONE

    def fail(self, error: RouterError) -> bytes:
        return encode_event(error_body(error))

    def beat(self) -> bytes:
        return KEEP_ALIVE


def chat_reply_to_chat(reply: Json, opening: Opening, _origin: str) -> Json:
    head = {"id": f"chatcmpl-{opening.id}", "object": "chat.completion"}
    named = {"created": opening.created, "model": opening.model}
    return {**reply, **head, **named, **chat_head(reply)}


def chat_head(answer: Json) -> Json:
    """What an answer or a chunk says of itself; ids of other dialects would be odd in Chat."""
    told = {name: answer[name] for name in ("id", "created", "model") if answer.get(name)}
    if str(told.get("id")).startswith(("msg_", "resp_")):
        del told["id"]
    return told


KEEP_ALIVE: Final = b": keep-alive\n\n"


@dataclass(frozen=True)
class Surface:
    """A language that clients speak; where a provider speaks it too, bytes pass unchanged."""

    dialect: str  # what a provider must speak for that
    writer: Callable[[Opening, str], Writer]  # for an answer of the provider named
    whole: Callable[[Json, Opening, str], Json]
    beat: bytes = KEEP_ALIVE


CHAT: Final = Surface("chat", ChatWriter, chat_reply_to_chat)
EMBEDDINGS: Final = replace(CHAT, dialect="embeddings")
MESSAGES: Final = Surface("messages", MessagesWriter, chat_reply_to_messages, PING)
COMPLETIONS: Final = Surface(
    "completions",
    lambda opening, _origin: CompletionsWriter(opening),
    lambda reply, opening, _origin: chat_reply_to_completion(reply, opening),
)


def responses_surface(codex: bool, earlier: Sequence[Json]) -> Surface:
    """The Responses surface of one request: `earlier` are the items of the turns before it."""
    return Surface(
        "responses",
        lambda opening, origin: ResponsesWriter(opening, codex, earlier, origin),
        lambda reply, opening, origin: chat_reply_to_responses(
            reply, opening, codex, earlier, origin
        ),
    )


NOBODY: Final = ("", "")  # no target and no dialect


class Step(NamedTuple):
    """One attempt as people may read of it later: no content, no key."""

    label: str  # provider/model
    key_tail: str
    verdict: str  # "ok", or why it failed
    status: int  # HTTP status of the provider; 0 = none came
    seconds: float
    text: str = ""  # the provider's reason, scrubbed


@dataclass
class Trace:
    """What becomes of one request, for the log, the metrics and `why`; never any content."""

    MAX_STEPS: ClassVar[int] = 64

    id: str
    endpoint: str
    caller: Caller
    at: float  # unix seconds
    began: float = 0.0  # on the router's clock
    streaming: bool = False
    asked: str = ""  # the model that the client named
    choice: str = ""  # what that name means here
    level: int | None = None  # difficulty
    tokens: int = 0  # estimated size of the prompt
    plan: Any = None  # what the candidates were arranged from; shared, not copied
    steps: list[Step] = field(default_factory=list)
    skipped: Sequence[str] = ()
    cache: str = "off"
    provider: str = ""
    model: str = ""
    rescuer: str = ""  # who went on with a stream that broke off
    ttft_s: float | None = None
    seconds: float = 0.0
    prompt: int | None = None
    completion: int | None = None
    cost: float | None = None  # USD; None = unknown
    status: int = 0  # HTTP status of the answer; 499 = the client left
    outcome: str = ""  # success, error, cache_hit or cancelled
    error: str = ""

    def note(self, step: Step) -> None:
        if len(self.steps) < self.MAX_STEPS:
            self.steps.append(step)

    def spent(self, prompt: int, completion: int, cost: float | None) -> None:
        """Add the tokens of one answer, or of one part of it."""
        self.prompt = (self.prompt or 0) + prompt
        self.completion = (self.completion or 0) + completion
        if cost is not None:
            self.cost = (self.cost or 0.0) + cost


@dataclass
class Ask:
    """One client request on its way: as sent, as parsed, as chat, and who waits for it."""

    surface: Surface
    raw: bytes
    body: Json
    chat: Json  # the body itself where the client speaks Chat
    guard: Guard
    stream: bool = False
    wants_usage: bool = False
    caller: Caller = ITSELF
    trace: Trace = field(default_factory=lambda: Trace("", "", ITSELF, 0.0))
    started: float = 0.0
    request_id: str = ""
    tokens: int = 0  # how large it is, about
    fallback: bool = False  # other models are fine, whatever STRICT_MODEL says
    named: frozenset[str] = frozenset()  # labels of the targets that the client named
    forward: bytes = b""  # header lines for a provider of the same dialect
    left_out: Sequence[str] = ()  # tools that nobody here can run
    input: list[Json] | None = None  # Responses: all items, those of earlier turns included
    kept_body: tuple[tuple[str, str], bytes] = (NOBODY, b"")  # the body made last, for whom
    make_flow: Callable[[Passage], Flow] | None = None  # where it goes on with another answer
    # (label, dialect) -> what was changed after a refusal
    mends: dict[tuple[str, str], tuple[Mend, ...]] = field(default_factory=dict)

    @functools.cached_property
    def opening(self) -> Opening:
        model = self.body.get("model") or "hermes-router"
        return Opening(secrets.token_hex(12), model, int(time.time()), self.tokens, self.body)


class Whole(NamedTuple):
    """A whole answer on its way to the client, or what is wrong with it."""

    problem: Outcome | None
    body: bytes = b""
    tokens: Tokens | None = None
    final: Json | None = None  # the body, parsed


EVENTS_BEGIN: Final = re.compile(rb"\s*(?:event|data|id|retry)?:")


@dataclass
class Passage:
    """How one answer gets from a provider's dialect to a client's."""

    dialect: Dialect
    ask: Ask
    origin: str = ""  # the provider
    secret: bytes = field(default=b"", repr=False)

    @property
    def native(self) -> bool:
        return self.dialect.name == self.ask.surface.dialect

    def writer(self) -> Writer:
        return self.ask.surface.writer(self.ask.opening, self.origin)

    def reader(self) -> Reader:
        return self.dialect.reader(self.origin, self.ask.chat)

    def canonical(self, reply: Json) -> Json:
        return self.dialect.canonical(reply, self.origin, self.ask.chat)

    def flow(self) -> Flow:
        if self.ask.make_flow:
            return self.ask.make_flow(self)
        return Flow(self) if self.native else Translation(self)

    def whole(self, body: bytes) -> Whole:
        """A whole answer as the client gets it."""
        if EVENTS_BEGIN.match(body):
            return self._gathered(body)
        problem, reply = self.dialect.judge(body)
        if problem:
            problem, _ = self.dialect.judge(masked(body, self.secret))
            return Whole(problem or BROKEN)
        if self.native and not (self.dialect.name == "chat" and needs_reading(reply)):
            return Whole(None, body, self._tokens(reply), reply)
        return self._made(self.canonical(reply))

    def _tokens(self, reply: Json) -> Tokens | None:
        if self.dialect.name in ("chat", "embeddings"):
            return tokens_of(reply)
        return tokens_of(self.canonical(reply))

    def _gathered(self, body: bytes) -> Whole:
        """A stream where a whole answer was asked for: subscriptions only stream."""
        reader = self.reader()
        datas = [event_data(event) for event in split_events(masked(body, self.secret))]
        values = (read_json(data) for data in datas)
        chunks = [c for value in values if isinstance(value, dict) for c in reader.feed(value)]
        chunks += reader.finish()
        for chunk in chunks:
            if error := embedded_error(chunk):
                return Whole(error)
        if not (reader.finished or (self.dialect.name == "chat" and b"[DONE]" in datas)):
            return Whole(Outcome(0, "the stream ended without a finish", "reset"))
        return self._made(gathered_reply(chunks))

    def _made(self, chat: Json) -> Whole:
        if error := embedded_error(chat):
            return Whole(error)
        if not any(answers(choice) for choice in chat.get("choices") or ()):
            return Whole(Outcome(0, "an answer without content", "empty"))
        made = self.ask.surface.whole(chat, self.ask.opening, self.origin)
        return Whole(None, dump_json(made), tokens_of(chat), made)


class Renamed:
    """A writer that goes on with a Response under the ids that the client knows."""

    def __init__(self, writer: ResponsesWriter, names: Mapping[bytes, bytes]) -> None:
        self._writer, self._names = writer, names

    def feed(self, chunk: Json) -> bytes:
        return self._told(self._writer.feed(chunk))

    def finish(self) -> bytes:
        return self._told(self._writer.finish())

    def fail(self, error: RouterError) -> bytes:
        return self._told(self._writer.fail(error))

    def beat(self) -> bytes:
        return self._told(self._writer.beat())

    @property
    def response(self) -> Json | None:
        told = read_json(self._told(dump_json(self._writer.response)))
        return told if isinstance(told, dict) else None

    def _told(self, data: bytes) -> bytes:
        for own, known in self._names.items():
            data = data.replace(own, known)
        return data


class Said(NamedTuple):
    """What the client has of an answer that broke off, and what goes on writing for it."""

    text: str
    writer: Writer


class Flow:
    """The events of one answer on their way to the client, as they came.

    Fed with blocks of whole events. Before `useful` is set nothing may reach the client;
    once `failure` is set nothing more does but what `fail` gives. From its first tool call on
    an answer is held back until it is finished: one that breaks off there is made anew, unseen.
    """

    def __init__(self, passage: Passage) -> None:
        self._passage, self._dialect = passage, passage.dialect
        self.useful = False
        self.alive = False  # something worth having has come, be it held back
        self.finished = False  # how the answer ended was stated
        self.done = False  # nothing comes any more
        self.odd = False  # what came is better translated
        self.final: Json | None = None  # the whole answer, where a dialect repeats it
        self.tokens: Tokens | None = None
        self.failure: Outcome | None = None
        self._calls: list[bytes] = []  # events held back
        self._calls_bytes = 0
        self.stirred = False  # more than a sign of life has come since this was last reset
        self._passed: list[bytes] = []  # blocks of events that the client got
        self._passed_bytes = 0

    def take(self, block: bytes) -> bytes:
        """What the client gets for a block of whole events."""
        made = block
        if block.count(b"data:") > block.count(b'"ping"'):
            self.stirred = True
        if self._calls or not (self.useful and self._dialect.only_content(block)):
            made = self._sift(block)
        self._passed_bytes += len(made)
        if made and self._passed_bytes <= MAX_PASSED_BYTES:
            self._passed.append(made)
        return made

    def _sift(self, block: bytes) -> bytes:
        """Halving finds the few events that need a look without parsing all the others."""
        plain = self.useful and not self._calls
        if plain and self._dialect.only_content(block):
            return block
        cut = last_event_end(block[: len(block) // 2]) if plain else 0
        if not cut:
            return b"".join(map(self._look, split_events(block)))
        return self._sift(block[:cut]) + self._sift(block[cut:])

    def _look(self, event: bytes) -> bytes:
        """One event that may be more than content; what the client gets of it."""
        data = event_data(event)
        if self.failure or not data:
            return b"" if self.failure else event
        sight = self._dialect.see(data)
        if sight.error:
            self.failure = self._dialect.see(masked(data, self._passage.secret)).error or BROKEN
            return b""
        if sight.calls or self._calls or (sight.broken and CALL_MARKS.search(data)):
            return self._hold(event, sight)
        self._note(sight)
        withheld = sight.only_usage and not self._passage.ask.wants_usage
        return b"" if self.failure or withheld or sight.broken else event

    def _hold(self, event: bytes, sight: Sight) -> bytes:
        """Events from the first tool call on; all of them once the answer is finished."""
        self.alive = True
        if sight.broken:  # what is missing would change the call
            self.failure = Outcome(0, "a broken event in a tool call", "garbled")
            return b""
        if not self._calls:  # what the first part looks like tells
            self.odd = self.odd or (sight.odd and not self.useful)
        self._calls.append(event)
        self._calls_bytes += len(event)
        if self._calls_bytes > MAX_EVENT_BYTES:
            self.failure = Outcome(0, "a tool call without an end", "garbled")
        if self.failure or not (sight.finished or sight.done):
            return b""
        return self._release(sight)

    def _release(self, sight: Sight) -> bytes:
        """The events of whole tool calls; calls that are no JSON are put right or refused."""
        if not self.odd and sound_calls(self._read(self._calls)) is not SOUND:
            if self.useful:
                self.failure = Outcome(0, "a tool call that is no JSON", "garbled")
                return b""
            self.odd = True
        held, self._calls = self._calls, []
        self._note(sight._replace(sign="useful", odd=False))
        block = b"".join(held)
        if self.odd:
            self._calls = held  # to be translated
        return block

    def _read(self, events: Iterable[bytes]) -> list[Json]:
        """Events as canonical chunks."""
        reader = self._passage.reader()
        values = (read_json(event_data(event)) for event in events)
        chunks = [c for value in values if isinstance(value, dict) for c in reader.feed(value)]
        return chunks + reader.finish()

    def _note(self, sight: Sight) -> None:
        if sight.tokens:
            old = self.tokens or Tokens()
            pairs = zip(sight.tokens, old, strict=True)
            self.tokens = Tokens(*(new or before for new, before in pairs))
        self.finished = self.finished or sight.finished
        self.done = self.done or sight.done
        self.final = sight.final or self.final
        if sight.sign == "empty finish" and not self.useful:
            self.failure = Outcome(0, "a stream without content", "empty")
        elif sight.sign:
            self.odd = self.odd or (sight.odd and not self.useful)
            self.useful = self.alive = True

    def end(self, rest: bytes) -> bytes:
        """The body ended with `rest`: the event without a blank line, if any, and a proper end."""
        rest = rest.strip(b"\r\n")
        data = event_data(rest)
        block = b""
        if data == b"[DONE]" or read_json(data) is not None:
            block = self._look(rest + b"\n\n")
        if self.failure or self.done:
            return block
        if self.finished:
            return block + self._close()
        self.failure = Outcome(0, "the stream ended without a finish", "reset")
        return block

    def _close(self) -> bytes:
        return self._dialect.closing

    def adopt(self, body: bytes) -> bytes:
        """A whole answer where a stream was asked for, as a stream."""
        self.failure, reply = self._dialect.judge(masked(body, self._passage.secret))
        if self.failure:
            return b""
        if self._dialect.name == "chat":
            chunks = chunks_from_reply(reply)
            return self.take(b"".join(map(encode_event, chunks)) + DONE)
        self.useful = self.finished = self.done = True
        chat = self._passage.canonical(reply)
        self.tokens = tokens_of(chat)
        writer = self._passage.writer()
        return b"".join(map(writer.feed, chunks_from_reply(chat))) + writer.finish()

    def translated(self) -> tuple[Flow, bytes]:
        """The same from its beginning, but translated: for an odd accent."""
        other = Translation(self._passage)
        return other, other.take(b"".join([*self._passed, *self._calls]))

    def said(self) -> Said | None:
        """What can be gone on with; None where another provider could not do so honestly."""
        if self._passed_bytes > MAX_PASSED_BYTES:
            return None
        writer, reader = self._passage.writer(), self._passage.reader()
        passed = b"".join(self._passed)
        values = (read_json(event_data(event)) for event in split_events(passed))
        chunks = [c for value in values if isinstance(value, dict) for c in reader.feed(value)]
        told = b"".join(map(writer.feed, chunks))
        if isinstance(writer, ResponsesWriter):
            writer.go_on_from(last_number(passed) + 1)
            writer = Renamed(writer, dict(zip(ids_in(told), ids_in(passed), strict=False)))
        text = spoken(chunks)
        return None if text is None else Said(text, writer)

    def fail(self, error: RouterError) -> bytes:
        """The event that ends a committed stream; no [DONE], no finish: nothing is faked."""
        first, last = (self._passed[0], self._passed[-1]) if self._passed else (b"", b"")
        return self._dialect.broken(first, last, error)

    def beat(self) -> bytes:
        """A sign of life while the provider is silent."""
        return self._passage.ask.surface.beat


MAX_PASSED_BYTES: Final = 512 << 10  # of a stream that another provider may go on with


def spoken(chunks: Sequence[Json]) -> str | None:
    """The text in the chunks of one answer; None if there is more than text and reasoning."""
    texts = []
    for chunk in chunks:
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            if choice.get("index") or any(delta.get(name) for name in NOT_TEXT):
                return None
            texts.append(delta.get("content") or "")
    return "".join(texts)


NOT_TEXT: Final = ("tool_calls", "function_call", "refusal", "audio")
# In an event that cannot be parsed: it was a part of a tool call.
CALL_MARKS: Final = re.compile(rb'"(?:tool_calls|partial_json|arguments)"')
SOUND: Final[list[Json]] = []  # stands for chunks that need no change


def sound_calls(chunks: Sequence[Json]) -> list[Json] | None:
    """The chunks with tool calls whose arguments are JSON: SOUND when they are, None if hopeless.

    Arguments cut off by a length limit stay as they are: the finish tells.
    """
    texts: dict[tuple[Any, Any], str] = {}
    for choice in (c for chunk in chunks for c in chunk.get("choices") or ()):
        if choice.get("finish_reason") == "length":
            return SOUND
        for call in (choice.get("delta") or {}).get("tool_calls") or ():
            if "function" in call:
                place = (choice.get("index"), call.get("index"))
                texts[place] = texts.get(place, "") + (call["function"].get("arguments") or "")
    mended = {place: repaired_arguments(text) for place, text in texts.items()}
    if all(mended[place] == text or not text.strip() for place, text in texts.items()):
        return SOUND
    if any(text is None for text in mended.values()):
        return None
    return [with_arguments(chunk, mended) for chunk in chunks]


def with_arguments(chunk: Json, mended: dict[tuple[Any, Any], str | None]) -> Json:
    """The chunk with each call's mended arguments in its first delta, and in no later one."""
    choices = []
    for choice in chunk.get("choices") or ():
        calls = (choice.get("delta") or {}).get("tool_calls")
        if calls:
            told = []
            for call in calls:
                place = (choice.get("index"), call.get("index"))
                text, mended[place] = mended.get(place) or "", ""
                told.append({**call, "function": {**call.get("function", {}), "arguments": text}})
            choice = {**choice, "delta": {**choice["delta"], "tool_calls": told}}
        choices.append(choice)
    return {**chunk, "choices": choices}


class Translation(Flow):
    """The same from one dialect to another, through canonical chunks."""

    def __init__(self, passage: Passage, writer: Writer | None = None) -> None:
        super().__init__(passage)
        self._reader = passage.reader()
        self._writer = writer or passage.writer()
        self.broken: list[Json] = []  # chunks that the client got
        self._held: list[Json] = []  # chunks from the first tool call on

    def take(self, block: bytes) -> bytes:
        if block.count(b"data:") > block.count(b'"ping"'):
            self.stirred = True
        return b"".join(map(self._look, split_events(block)))

    def _look(self, event: bytes) -> bytes:
        try:
            return self._translate(event_data(event))
        except Exception:  # a fault of ours must not look like a crash to the client
            log.exception("an event of %s could not be translated", self._passage.origin)
            self.failure = BROKEN
            return b""

    def _translate(self, data: bytes) -> bytes:
        if self.failure or self.done or not data:
            return b""
        if data == b"[DONE]":
            # Responses have an end of their own; where one is missing, nothing was finished.
            self.finished = self.finished or self._dialect.name == "chat"
            return self._close() if self.finished else b""
        value = read_json(data)
        if not isinstance(value, dict):
            if self._held or CALL_MARKS.search(data):  # what is missing would change the call
                self.failure = Outcome(0, "a broken event in a tool call", "garbled")
            return b""
        out = self._written(self._reader.feed(value))
        self.finished = self.finished or self._reader.finished
        kind = value.get("type")
        if isinstance(kind, str) and kind in self._dialect.last and self.finished:
            return out + self._close()
        return out

    def _written(self, chunks: Iterable[Json]) -> bytes:
        out: list[bytes] = []
        for chunk in chunks:
            if "error" in chunk:
                hidden = read_json(masked(dump_json(chunk), self._passage.secret))
                self.failure = embedded_error(hidden) or BROKEN
                return b"".join(out)
            if self._held or has_calls(chunk):
                self.alive = True
                self._held.append(chunk)
            else:
                out.append(self._write(chunk))
        return b"".join(out)

    def _write(self, chunk: Json) -> bytes:
        self._note(Sight(chunk_sign(chunk), None, tokens_of(chunk)))
        if len(self.broken) < MAX_TOLD:
            self.broken.append(chunk)
        return self._writer.feed(chunk)

    def _close(self) -> bytes:
        block = self._written(self._reader.finish())
        held, self._held = self._held, []
        mended = sound_calls(held)
        if mended is None:
            self.failure = Outcome(0, "a tool call that is no JSON", "garbled")
            return block
        block += b"".join(map(self._write, held if mended is SOUND else mended))
        self.done = True
        if not self.useful and not self.failure:
            self.failure = Outcome(0, "a stream without content", "empty")
        if self.failure:
            return block
        block += self._writer.finish()
        self.final = getattr(self._writer, "response", None)
        return block

    def adopt(self, body: bytes) -> bytes:
        self.failure, reply = self._dialect.judge(masked(body, self._passage.secret))
        if self.failure:
            return b""
        self.finished = self.done = True
        chat = self._passage.canonical(reply)
        return b"".join(map(self._write, chunks_from_reply(chat))) + self._writer.finish()

    def said(self) -> Said | None:
        text = spoken(self.broken) if len(self.broken) < MAX_TOLD else None
        return None if text is None else Said(text, self._writer)

    def fail(self, error: RouterError) -> bytes:
        return self._writer.fail(error)

    def beat(self) -> bytes:
        return self._writer.beat()


MAX_TOLD: Final = 50_000  # chunks


class Continuation(Translation):
    """An answer that goes on where another broke off; what it repeats is left out.

    Without `prefilled` the provider was not told what had been said: only an answer that
    repeats all of it is one and the same.
    """

    def __init__(self, passage: Passage, said: Said, prefilled: bool) -> None:
        super().__init__(passage, said.writer)
        self._trimmer = Trimmer(said.text, not prefilled)

    def _write(self, chunk: Json) -> bytes:
        choices = [self._new(choice) for choice in chunk.get("choices") or ()]
        if self._trimmer.strange:
            self.failure = Outcome(0, "it tells something else", "strange")
            return b""
        ended = any(choice.get("finish_reason") for choice in choices)
        self.useful = self.useful or ended  # be it that all had been said
        self.alive = True
        return super()._write({**chunk, "choices": choices})

    def _new(self, choice: Json) -> Json:
        """A choice without what the client has already: the text, its role, its reasoning."""
        delta = {k: v for k, v in (choice.get("delta") or {}).items() if k in CONTINUED}
        ended = choice.get("finish_reason") or delta.get("tool_calls")
        text = self._trimmer.feed(delta.pop("content", None) or "", bool(ended))
        return {**choice, "delta": {**delta, "content": text} if text else delta}


CONTINUED: Final = ("content", "tool_calls", "annotations")


class Trimmer:
    """Leaves out of a text what has been said before."""

    MIN_OVERLAP: ClassVar[int] = 16  # characters; a shorter repetition may be meant

    def __init__(self, said: str, must_repeat: bool) -> None:
        self._said, self._must_repeat = said, must_repeat
        self._at = 0  # so much of it has been repeated
        self._settled = not said
        self.strange = False  # it is another text

    def feed(self, text: str, ended: bool) -> str:
        """What of `text` is new; while it may be a repetition nothing is."""
        if self._settled or not (text or ended):
            return text
        said, at = self._said, self._at
        left = len(said) - at
        repeats = said.startswith(text[:left], at)
        if repeats and len(text) < left and not ended:
            self._at += len(text)
            return ""
        self._settled = True
        if repeats and len(text) >= left:
            return text[left:]
        self.strange = self._must_repeat
        text = said[:at] + text
        return text[overlap(said, text, self.MIN_OVERLAP) :] if not self.strange else ""


def overlap(said: str, text: str, least: int) -> int:
    """How many characters at the start of `text` repeat the end of `said`."""
    blanks = len(said) - len(said.rstrip())
    for size in range(min(len(said), len(text), 400), 0, -1):
        if (size >= least or size <= blanks) and said.endswith(text[:size]):
            return size
    return 0


BROKEN: Final = Outcome(0, "an answer that cannot be used", "garbled")


def masked(data: bytes, secret: bytes) -> bytes:
    """`data` without the provider's key: some repeat it in their errors."""
    return data.replace(secret, b"[redacted]") if secret and secret in data else data


# =============================================================================
# 19. Database
# =============================================================================


class Database:
    """One SQLite file: written by one thread, in batches; read by anybody.

    `write` only puts a statement into a bounded queue, so that no request waits for a disk;
    everything queued is committed together every EVERY_S seconds. Nothing that happens to the
    file disturbs anybody: a disk that fails is told once, what cannot be written is dropped and
    counted. A file that is no database is set aside. `path` None = off: reads find nothing.
    """

    EVERY_S: ClassVar[float] = 0.5
    MAX_QUEUED: ClassVar[int] = 10_000
    MAX_READERS: ClassVar[int] = 8

    def __init__(self, path: Path | None, schema: str) -> None:
        self._path, self._schema = path, schema
        self._queue: deque[tuple[str, Sequence[object]]] = deque(maxlen=self.MAX_QUEUED)
        self._readers: deque[Any] = deque(maxlen=self.MAX_READERS)
        self._lock = threading.Lock()  # of the one connection that writes
        self._writer: Any = None
        self._failing = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def on(self) -> bool:
        return self._path is not None

    def start(self) -> None:
        """Open the file and begin to write what is queued."""
        if self._path is None or self._thread is not None:
            return
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._open()
        except Exception as error:  # sqlite3.Error, OSError, no sqlite3 in this Python
            log.warning("%s is not used: %s", self._path.name, error)
            self._path = None
            return
        self._thread = threading.Thread(target=self._run, name="database", daemon=True)
        self._thread.start()

    def write(self, statement: str, *values: object) -> None:
        """Queue one statement; of a full queue the oldest is dropped."""
        if self._path is not None:
            self._queue.append((statement, values))

    def read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows of a query, without what is still queued; none where the file fails."""
        if self._path is None:
            return []
        try:
            connection = self._readers.pop() if self._readers else self._connect()
            found = connection.execute(query, values).fetchall()
        except Exception as error:
            self._tell(error)
            return []
        if len(self._readers) < self.MAX_READERS:
            self._readers.append(connection)
        return cast("list[tuple[Any, ...]]", found)

    def flush(self) -> None:
        """Write what is queued now."""
        batch = [self._queue.popleft() for _ in range(len(self._queue))]
        if not batch or self._writer is None:
            return
        try:
            with self._lock, self._writer:
                for statement, values in batch:
                    self._writer.execute(statement, values)
        except Exception as error:
            self._tell(error)
            return
        if self._failing:
            self._failing = False
            log.info("%s can be written again", self._name)

    def close(self) -> None:
        """Write for the last time and let go of the file."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join(10)
        if not self._thread.is_alive():  # else the disk hangs, and it is not waited for
            self.flush()
            for connection in [*self._readers, self._writer]:
                connection.close()
        self._thread = self._writer = None
        self._readers.clear()

    def _run(self) -> None:
        while not self._stop.wait(self.EVERY_S):
            self.flush()

    @property
    def _name(self) -> str:
        return self._path.name if self._path else "the database"

    def _tell(self, error: Exception) -> None:
        if not self._failing:
            log.warning("%s cannot be used, requests go on without it: %s", self._name, error)
        self._failing = True

    def _open(self) -> None:
        """The connection that writes; a file that is no database is moved out of the way."""
        import sqlite3  # not part of every Python

        path = cast(Path, self._path)
        try:
            self._writer = self._prepare(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # locked, read-only, full
                raise
            aside = path.with_name(path.name + ".bad")
            os.replace(path, aside)
            log.warning("%s is no database (%s), see %s", path.name, error, aside.name)
            self._writer = self._prepare(path)

    def _prepare(self, path: Path) -> Any:
        if not path.exists():
            write_private(path, "")  # SQLite's own files beside it get the same mode
        connection = self._connect()
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.executescript(self._schema)
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect(self) -> Any:
        import sqlite3

        return sqlite3.connect(cast(Path, self._path), timeout=5, check_same_thread=False)


# =============================================================================
# 20. Keys
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
        "overloaded",
    }
)
DEAD: Final = frozenset({"dead_key"})  # why a key rests that its provider called invalid
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

    def another(self, provider: str, model: str, tried: Iterable[str]) -> bool:
        """Whether a key that is not among `tried` is ready."""
        with self._lock:
            return any(
                key not in tried and not self._resting(provider, key, model, frozenset())
                for key in self._keys.get(provider, ())
            )

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

    def held(self) -> Mapping[str, tuple[str, ...]]:
        """The keys of each provider."""
        return self._keys

    def rests(self) -> dict[tuple[str, str, str], Rest]:
        """What rests now: (provider, key, model) -> until when, and why."""
        with self._lock:
            now = self._now()
            return {place: rest for place, rest in self._rests.items() if rest.until > now}

    def dead(self) -> list[tuple[str, str]]:
        """(provider, key) of every key that is in quarantine."""
        return [
            (provider, key)
            for (provider, key, model), rest in self.rests().items()
            if rest.why in DEAD and model == ANY and key != ANY
        ]

    def revive(self, provider: str, key: str) -> None:
        """A dead key is valid again; its other rests stay."""
        with self._lock:
            rest = self._rests.get((provider, key, ANY))
            if rest and rest.why in DEAD:
                del self._rests[provider, key, ANY]

    def soonest(
        self, provider: str, model: str, tried: Iterable[str] = frozenset()
    ) -> float | None:
        """Seconds until some key of the provider is ready for the model; None without keys."""
        with self._lock:
            waits = [
                max((r.until for r in self._over(provider, key, model)), default=0.0) - self._now()
                for key in self._keys.get(provider, ())
                if key not in tried
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
# 21. Accounts
# =============================================================================

# ChatGPT accounts that Codex runs on, signed in elsewhere (`codex login`): an access token
# of about an hour, and a refresh token that works once. From auth.json `codex_accounts`.
CODEX_CLIENT_ID: Final = "app_EMoamEEZ73f0CkXaXp7hrann"
TOKEN_SPARE_S: Final = 300.0  # a token is renewed this long before it ends
TOKEN_LIFE_S: Final = 3600.0  # of a token that does not say when it ends
REFRESH_LIMIT_S: Final = 30.0
MAX_CODEX_WAIT_S: Final = 7 * 86_400.0  # the plan's longest window

Post = Callable[[str, Json, float], tuple[int, Any]]  # (url, body, seconds) -> (status, JSON)


class AccountError(Exception):
    """No access token can be had for an account now; counts as a network failure of it."""

    sort = "network"

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


@dataclass
class Flight:
    """A refresh under way: others wait for `landed` and take what it brought."""

    landed: threading.Event = field(default_factory=threading.Event)
    token: str = field(default="", repr=False)
    error: str = "the refresh failed"


def token_end(token: str) -> float:
    """When a token ends, in unix seconds; 0.0 if it does not say."""
    end = jwt_claims(token).get("exp")
    return finite_number(end) or 0.0


class Accounts:
    """The access token of each account, renewed by one thread while the others wait.

    One lock, for the dictionaries and the rare rewrite of auth.json; never held while the
    token endpoint is asked. `post` may raise what the transport raises; `wall` gives unix
    seconds.
    """

    def __init__(
        self,
        accounts: Iterable[Account],
        path: Path,
        post: Post,
        wall: Callable[[], float],
        url: str = CODEX_TOKEN_URL,
    ) -> None:
        self._lock = threading.Lock()
        self._path, self._post, self._wall, self._url = path, post, wall, url
        self._accounts = {account.id: account for account in accounts}
        self._stored = {a.id: a.refresh_token for a in self._accounts.values()}
        self._ends = {a.id: token_end(a.access_token) for a in self._accounts.values()}
        self._flights: dict[str, Flight] = {}

    @property
    def ids(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._accounts)

    def access_token(self, id: str, patience_s: float = REFRESH_LIMIT_S + 5) -> str:
        """A token good for five minutes or more; AccountError if there is none in time."""
        with self._lock:
            token = self._usable(id)
            if token:
                return token
            flight = self._flights.get(id)
            mine = flight is None
            if flight is None:
                flight = self._flights[id] = Flight()
        if mine:
            self._fly(id, flight)
        elif not flight.landed.wait(patience_s):
            raise AccountError(f"codex account {key_tail(id)}: the refresh takes too long")
        if not flight.token:
            raise AccountError(f"codex account {key_tail(id)}: {flight.error}")
        return flight.token

    def reject(self, id: str, token: str) -> None:
        """The provider refused this token: the next caller renews it."""
        with self._lock:
            account = self._accounts.get(id)
            if account and account.access_token == token:
                self._ends[id] = 0.0

    def _usable(self, id: str) -> str:
        account = self._accounts.get(id)
        if account is None:
            raise AccountError(f"codex account {key_tail(id)} is not in {self._path.name}")
        good = account.access_token and self._ends[id] - TOKEN_SPARE_S > self._wall()
        return account.access_token if good else ""

    def _fly(self, id: str, flight: Flight) -> None:
        """Renew a token, and let those who wait for it go whatever happens."""
        try:
            flight.token = self._from_file(id) or self._refresh(id)
        except AccountError as error:
            flight.error = error.text
            log.warning("codex account %s: %s", key_tail(id), error.text)
        finally:
            with self._lock:
                del self._flights[id]
            flight.landed.set()

    def _from_file(self, id: str) -> str:
        """The token of a newer sign-in, if auth.json holds one since it was last read."""
        with self._lock:
            document, _ = self._read_file()
            for account in read_accounts(document):
                if account.id == id and account.refresh_token != self._stored[id]:
                    self._keep(account, token_end(account.access_token))
                    self._stored[id] = account.refresh_token
            return self._usable(id)

    def _keep(self, account: Account, end: float) -> None:
        self._accounts[account.id] = account
        self._ends[account.id] = end

    def _refresh(self, id: str) -> str:
        """Trade the refresh token for a new pair and keep both, in memory and on disk."""
        with self._lock:
            old = self._accounts[id]
        body = {
            "client_id": CODEX_CLIENT_ID,
            "grant_type": "refresh_token",
            "refresh_token": old.refresh_token,
        }
        try:
            status, answer = self._post(self._url, body, REFRESH_LIMIT_S)
        except (OSError, ValueError) as error:
            raise AccountError(f"the token endpoint failed: {type(error).__name__}") from None
        token = answer.get("access_token") if isinstance(answer, dict) else None
        if status != 200 or not isinstance(token, str) or not re.fullmatch(r"[!-~]+", token):
            raise AccountError(token_refusal(status, answer, old))
        now = self._wall()
        life = answer.get("expires_in")
        end = token_end(token) or now + (float(life) if is_number(life) else TOKEN_LIFE_S)
        rotated = answer.get("refresh_token")
        rotated = rotated if isinstance(rotated, str) and rotated else old.refresh_token
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        with self._lock:
            self._keep(Account(id, rotated, token, stamp), end)
            self._save(id, answer.get("id_token"))
        return token

    def _read_file(self) -> tuple[Json, str]:
        """(what auth.json holds now, "" or why it cannot be used)."""
        try:
            document = json.loads(self._path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            return {}, type(error).__name__
        return (document, "") if isinstance(document, dict) else ({}, "it holds no object")

    def _save(self, id: str, identity: object) -> None:
        """Put new tokens into the account's rows of auth.json, read anew: all else stays.

        A row that meanwhile got another refresh token is newer than ours and is left alone, as
        is a file that is gone or broken; the tokens then live until the process ends.
        """
        account, (document, problem) = self._accounts[id], self._read_file()
        rows = [row for row in account_rows(document) if is_row_of(row, id, self._stored[id])]
        for row in rows:
            holder = token_holder(row)
            holder["access_token"] = account.access_token
            holder["refresh_token"] = account.refresh_token
            if "id_token" in holder and isinstance(identity, str):
                holder["id_token"] = identity
            row["last_refresh"] = account.last_refresh
        try:
            if rows:
                text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
                write_private(self._path.resolve(), text)
                self._stored[id] = account.refresh_token
        except (OSError, ValueError) as error:  # ValueError: half a surrogate pair in a text
            problem = type(error).__name__
        if problem:
            name, tail = self._path.name, key_tail(id)
            log.error("%s: new tokens of codex account %s not stored: %s", name, tail, problem)


def is_row_of(row: Json, id: str, refresh_token: str) -> bool:
    account = read_account(row)
    return account is not None and (account.id, account.refresh_token) == (id, refresh_token)


def token_refusal(status: int, answer: object, account: Account) -> str:
    """Why no token came, without any token in it."""
    body = answer if isinstance(answer, dict) else {}
    code, text = error_code(dump_json(body)), dig_message(body)
    why = scrub(f"{text} {code}", 200)
    for secret in (account.refresh_token, account.access_token):
        why = why.replace(secret, "[redacted]") if secret else why
    hint = "; sign in again with `codex login`" if status in (400, 401, 403) else ""
    return f"the token endpoint answered {status} {why}".strip() + hint


def codex_headers(account_id: str, session_id: str = "") -> dict[str, str]:
    """Headers of a Codex request beside Authorization (as Codex CLI sent them, 2026-09)."""
    headers = {
        "chatgpt-account-id": account_id,
        "Accept": "text/event-stream",
        "Content-Type": "application/json",
        "originator": "codex_cli_rs",
        "OpenAI-Beta": "responses=experimental",
    }
    if re.fullmatch(r"[\w.:-]{1,128}", session_id, re.ASCII):
        headers["session_id"] = session_id
    return headers


def codex_wait(headers: Mapping[str, str], body: bytes, wall: float) -> float | None:
    """Seconds until a 429 of Codex is over, at least 1; None when it does not say.

    A plan has a short window (primary, 5 hours) and a long one (secondary, a week). Only a
    window that is used up counts: the body may name the end of the long one although the
    short one is what is full (sub2api#2264).
    """
    names = ("primary", "secondary")
    windows = [window for name in names if (window := codex_window(headers, name, wall))]
    full = [wait for used, wait in windows if used >= 100]
    open_waits = [wait for used, wait in windows if used < 100]
    stated = codex_body_wait(body, wall)
    if full:
        stated = max(full)
    elif stated is not None:
        stated = min([stated, *open_waits])
    else:
        stated = finite_number(headers.get("retry-after"))
    return None if stated is None else min(max(stated, 1.0), MAX_CODEX_WAIT_S)


def codex_window(headers: Mapping[str, str], name: str, wall: float) -> tuple[float, float] | None:
    """(percent used, seconds until it starts anew) of one window; None if not stated."""
    used = finite_number(headers.get(f"x-codex-{name}-used-percent"))
    wait = finite_number(headers.get(f"x-codex-{name}-reset-after-seconds"))
    if wait is None and (at := finite_number(headers.get(f"x-codex-{name}-reset-at"))) is not None:
        wait = at - wall
    return None if used is None or wait is None else (used, wait)


def codex_body_wait(body: bytes, wall: float) -> float | None:
    """`resets_in_seconds`, or `resets_at` in unix seconds, of the error."""
    value = read_json(body)
    error = value.get("error") if isinstance(value, dict) else None
    error = error if isinstance(error, dict) else {}
    wait = finite_number(error.get("resets_in_seconds"))
    at = finite_number(error.get("resets_at"))
    return wait if wait is not None or at is None else at - wall


def finite_number(value: object) -> float | None:
    """A number, or a text that is one; None for all else."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


# =============================================================================
# 22. Breakers
# =============================================================================


class Circuit:
    """The latest outcomes of one provider and whether it is open."""

    __slots__ = ("open_until", "outcomes", "owner", "pauses", "probe_until")

    def __init__(self, window: int) -> None:
        self.outcomes: deque[bool] = deque(maxlen=window)
        self.open_until = 0.0  # 0 = closed; in the past = half open
        self.pauses = 0  # how often it opened in a row
        self.probe_until = 0.0  # a probe is under way until then
        self.owner: object = None  # whose probe it is


class Breakers:
    """Which provider is resting: a sliding window of outcomes, then exactly one probe.

    Closed -> open when `min_samples` outcomes hold a share of failures >= `error_rate`; open
    for FIRST_PAUSE_S, then one request may probe: success closes, failure re-opens, from the
    second one on for twice as long each time, at most `cooldown` seconds.
    """

    FIRST_PAUSE_S: ClassVar[float] = 15.0

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
                self._open(circuit)

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

    def wait(self, provider: str) -> float:
        """Seconds until a probe may go there."""
        circuit = self._circuits.get(provider)
        return max(0.0, circuit.open_until - self._now()) if circuit else 0.0

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

    def circuits(self) -> dict[str, tuple[str, float]]:
        """Of each circuit worth remembering: its outcomes ("1" = well), and until when it is open.

        The time is on this object's clock; 0 = closed, in the past = half open.
        """
        with self._lock:
            return {
                provider: ("".join(str(int(ok)) for ok in circuit.outcomes), circuit.open_until)
                for provider, circuit in self._circuits.items()
                if circuit.open_until or False in circuit.outcomes
            }

    def restore(self, provider: str, outcomes: str, wait_s: float | None) -> None:
        """A circuit as it was; `wait_s` until it may be probed, None = closed."""
        circuit = Circuit(self._window)
        circuit.outcomes.extend(letter == "1" for letter in outcomes)
        if wait_s is not None:
            # 0 would mean closed.
            circuit.open_until = self._now() + min(max(wait_s, 0.0), self._cooldown) or -1e-9
        with self._lock:
            self._circuits[provider] = circuit

    def _tripped(self, circuit: Circuit) -> bool:
        seen = len(circuit.outcomes)
        return seen >= self._min and circuit.outcomes.count(False) / seen >= self._rate

    def _settle(self, circuit: Circuit, ok: bool) -> None:
        """The outcome of the probe."""
        circuit.probe_until = 0.0
        if ok:
            circuit.open_until, circuit.pauses = 0.0, 0
            circuit.outcomes.clear()
        else:
            self._open(circuit)

    def _open(self, circuit: Circuit) -> None:
        growth = 2.0 ** min(max(circuit.pauses - 1, 0), 20)
        pause = min(self._cooldown, self.FIRST_PAUSE_S * growth)
        circuit.open_until = self._now() + pause
        circuit.pauses += 1


# =============================================================================
# 23. State
# =============================================================================

STATE_MARK: Final = "hermes_router_state"  # a member that holds the version of the file's form
STATE_FORM: Final = 1
# No rest of a kind goes on for longer after a restart, whatever a file or a clock says.
LONGEST_GUESS_S: Final = 86_400.0
LONGEST_QUARANTINE_S: Final = 8 * 3600.0
LONGEST_REST_S: Final = 31 * 86_400.0  # a month's quota
WINDOW_KEPT_S: Final = 3600.0  # outcomes that are older tell nothing any more


def longest_rest(why: str) -> float:
    if why in GUESSES:
        return LONGEST_GUESS_S
    return LONGEST_QUARANTINE_S if why in DEAD else LONGEST_REST_S


class StateFile:
    """Keeps rests, dead keys and circuits in a file, so that a restart does not forget them.

    One thread writes, at most every EVERY_S seconds and only what changed. No key stands in the
    file, not even a part of one: only an HMAC of it, with a salt of this file. Whatever happens
    to the file, requests go on; of a disk that fails people read one warning. `path` None = off;
    `now` is the clock of the pool and the breakers, `wall` gives unix seconds.
    """

    EVERY_S: ClassVar[float] = 2.0
    RETRY_S: ClassVar[float] = 60.0  # after a write that failed
    MAX_RESTS: ClassVar[int] = 2000
    MAX_BYTES: ClassVar[int] = 4 << 20
    MAX_NAME: ClassVar[int] = 256  # characters of a model's name

    def __init__(
        self,
        path: Path | None,
        keys: KeyPool,
        breakers: Breakers,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._path, self._keys, self._breakers = path, keys, breakers
        self._now, self._wall = now, wall
        self._salt = secrets.token_bytes(16)
        self._kept: object = self._seen()
        self._failing = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Take up what the file holds, and keep it up to date from now on."""
        self.load()
        if self._path is not None and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="state", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write for the last time."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join(10)
            if not self._thread.is_alive():  # else the disk hangs, and it is not waited for
                self.save()
            self._thread = None

    def _run(self) -> None:
        while not self._stop.wait(self.RETRY_S if self._failing else self.EVERY_S):
            self.save()

    # -- writing ---------------------------------------------------------------------------

    def save(self) -> None:
        """Write what changed since the last time; a failure is told once, then tried again."""
        seen = self._seen()
        if self._path is None or seen == self._kept:
            return
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(self._path, json.dumps(self._document(*seen), indent=1) + "\n")
        except Exception as error:  # nothing that happens here may disturb anybody
            if not self._failing:
                log.warning("%s cannot be written: %s", self._path.name, error)
            self._failing = True
            return
        if self._failing:
            log.info("%s can be written again", self._path.name)
        self._kept, self._failing = seen, False

    def _seen(self) -> tuple[dict[tuple[str, str, str], Rest], dict[str, tuple[str, float]]]:
        return self._keys.rests(), self._breakers.circuits()

    def _document(
        self,
        rests: Mapping[tuple[str, str, str], Rest],
        circuits: Mapping[str, tuple[str, float]],
    ) -> Json:
        wall = self._wall()
        ahead = wall - self._now()  # of the pool's clock
        latest = sorted(rests.items(), key=lambda item: -item[1].until)
        short = [row for row in latest if len(row[0][2]) <= self.MAX_NAME]
        return {
            STATE_MARK: STATE_FORM,
            "saved_at": round(wall, 1),
            "salt": self._salt.hex(),
            "rests": [
                {
                    "provider": provider,
                    "key": key if key == ANY else self._fingerprint(provider, key),
                    "model": model,
                    "until": round(rest.until + ahead, 1),
                    "why": rest.why,
                }
                for (provider, key, model), rest in short[: self.MAX_RESTS]
            ],
            "breakers": {
                provider: {
                    "outcomes": outcomes,
                    "open_until": round(until + ahead, 1) if until else None,
                }
                for provider, (outcomes, until) in circuits.items()
            },
        }

    def _fingerprint(self, provider: str, key: str) -> str:
        text = f"{provider}\0{key}".encode()
        return hmac.new(self._salt, text, hashlib.sha256).hexdigest()[:32]

    # -- reading ---------------------------------------------------------------------------

    def load(self) -> None:
        """What the file holds goes on; a file that cannot be used is set aside."""
        if self._path is None:
            return
        try:
            self._path = self._path.resolve()  # a link stays one
            self._sweep(self._path)
            document = self._read(self._path)
            rests, circuits = self._restore(document)
        except (FileNotFoundError, NotADirectoryError):
            return
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: deep, or a ring
            self._set_aside(self._path, error)
            return
        self._kept = self._seen()
        if rests or circuits:
            log.info("%s: %d rests, %d breakers go on", self._path.name, rests, circuits)

    def _sweep(self, path: Path) -> None:
        """Remove what a router that was killed while writing left beside the file."""
        left = re.compile(re.escape(f".{path.name}.") + r"\w{8}")
        with suppress(OSError):
            for file in list(path.parent.iterdir()):
                if left.fullmatch(file.name) and file.stat().st_mtime < self._wall() - 3600:
                    file.unlink()

    def _read(self, path: Path) -> Json:
        """The document; ValueError when it is none of ours."""
        size = path.stat().st_size
        if not path.is_file() or size > self.MAX_BYTES:
            raise ValueError("not a file" if not path.is_file() else f"it has {size} bytes")
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get(STATE_MARK) != STATE_FORM:
            raise ValueError("it is not this version's")
        salt = bytes.fromhex(str(document.get("salt")))
        if len(salt) < 16 or finite_number(document.get("saved_at")) is None:
            raise ValueError("it lacks a salt or a time")
        self._salt = salt
        return document

    def _set_aside(self, path: Path, error: Exception) -> None:
        """A file that cannot be used stays for whoever wants to look: the latest one."""
        bad = path.with_name(path.name + ".bad")
        try:
            if not path.is_file():
                raise OSError("not a file")
            os.replace(path, bad)
            os.chmod(bad, stat.S_IRUSR | stat.S_IWUSR)
        except OSError as problem:
            self._path = None  # so that it is not written over
            log.warning(
                "%s cannot be used (%s) nor set aside (%s): nothing is kept over a restart",
                path.name,
                error,
                problem,
            )
        else:
            log.warning("%s cannot be used (%s), see %s", path.name, error, bad.name)

    def _restore(self, document: Json) -> tuple[int, int]:
        """How many rests and circuits go on; rows that make no sense are passed over."""
        saved_at = float(document["saved_at"])
        # A clock that was set back must not lengthen anything: no time has passed then.
        passed = max(0.0, self._wall() - saved_at)
        rows, circuits = document.get("rests"), document.get("breakers")
        keys = {
            (provider, self._fingerprint(provider, key)): key
            for provider, held in self._keys.held().items()
            for key in held
        }
        rests = [
            self._restore_rest(row, keys, saved_at, passed)
            for row in (rows if isinstance(rows, list) else [])[: self.MAX_RESTS]
            if isinstance(row, dict)
        ]
        opened = [
            self._restore_circuit(provider, circuit, saved_at, passed)
            for provider, circuit in (circuits.items() if isinstance(circuits, dict) else ())
            if provider in self._keys.held() and isinstance(circuit, dict)
        ]
        return sum(rests), sum(opened)

    def _restore_rest(
        self, row: Json, keys: Mapping[tuple[str, str], str], saved_at: float, passed: float
    ) -> bool:
        names = [row.get(name) for name in ("provider", "key", "model", "why")]
        provider, mark, model, why = (name if isinstance(name, str) else "" for name in names)
        key = ANY if mark == ANY else keys.get((provider, mark))
        until = finite_number(row.get("until"))
        if key is None or until is None or provider not in self._keys.held() or len(why) > 64:
            return False
        left = min(until - saved_at, longest_rest(why)) - passed
        if left <= 0 or not 0 < len(model) <= self.MAX_NAME:
            return False
        self._keys.rest(provider, key, model, left, why)
        return True

    def _restore_circuit(
        self, provider: str, circuit: Json, saved_at: float, passed: float
    ) -> bool:
        outcomes, until = circuit.get("outcomes"), finite_number(circuit.get("open_until"))
        if not isinstance(outcomes, str) or not re.fullmatch("[01]{0,1000}", outcomes):
            return False
        if passed > WINDOW_KEPT_S:
            outcomes = ""
        wait = None if until is None else until - saved_at - passed
        self._breakers.restore(provider, outcomes, wait)
        return wait is not None


# =============================================================================
# 24. Usage
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
# 25. Traces
# =============================================================================

LATENCY_BUCKETS_S: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_BUCKETS: Final = (100, 1000, 4000, 16_000, 64_000, 256_000, 1_000_000)


class Histogram:
    """Counts per bucket and label, as Prometheus wants them. Its owner's lock guards it."""

    MAX_LABELS: ClassVar[int] = 200

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.series: dict[str, list[float]] = {}  # label -> a count per bucket, above all, sum

    def observe(self, label: str, value: float) -> None:
        row = self.series.get(label)
        if row is None:
            label = label if len(self.series) < self.MAX_LABELS else "other"
            row = self.series.setdefault(label, [0] * (len(self.bounds) + 1) + [0.0])
        row[bisect.bisect_left(self.bounds, value)] += 1
        row[-1] += value


class Traces:
    """The latest requests, and how long and large they were. One lock, dictionary work only."""

    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        self._kept: deque[Trace] = deque(maxlen=max(0, size))
        self._by_id: dict[str, Trace] = {}
        self.histograms = {
            "request_latency_seconds": Histogram(LATENCY_BUCKETS_S),
            "time_to_first_token_seconds": Histogram(LATENCY_BUCKETS_S),
            "prompt_tokens": Histogram(TOKEN_BUCKETS),
        }

    def keep(self, trace: Trace) -> None:
        """A request that has ended."""
        with self._lock:
            if self._kept.maxlen:
                if len(self._kept) == self._kept.maxlen:
                    oldest = self._kept[0]
                    if self._by_id.get(oldest.id) is oldest:
                        del self._by_id[oldest.id]
                self._kept.append(trace)
                self._by_id[trace.id] = trace  # of two with one id the later
            self._measure(trace)
        if request_log.isEnabledFor(logging.DEBUG):
            request_log.debug("%s", trace_line(trace))

    def _measure(self, trace: Trace) -> None:
        made = self.histograms
        made["request_latency_seconds"].observe(trace.endpoint, trace.seconds)
        if trace.ttft_s is not None:
            made["time_to_first_token_seconds"].observe(trace.provider, trace.ttft_s)
        if trace.prompt is not None:
            made["prompt_tokens"].observe(trace.endpoint, trace.prompt)

    def find(self, id: str) -> Trace | None:
        with self._lock:
            return self._by_id.get(id)

    def latest(self) -> list[Trace]:
        """The newest first."""
        with self._lock:
            return [*reversed(self._kept)]

    @property
    def size(self) -> int:
        return self._kept.maxlen or 0

    def shapes(self, name: str) -> list[tuple[str, list[float]]]:
        """(label, counts per bucket, then the sum) of one histogram."""
        with self._lock:
            return [(label, [*row]) for label, row in self.histograms[name].series.items()]


def trace_line(trace: Trace) -> str:
    """One request in one line of a log file."""
    backend = f"{trace.provider}/{trace.model}" if trace.provider else "none"
    parts = (
        f"request {trace.id} endpoint={trace.endpoint} caller={trace.caller.name!r}",
        f"model={trace.asked!r} backend={backend} status={trace.status}",
        f"latency={trace.seconds:.3f} attempts={len(trace.steps)}",
        f"cache_hit={trace.outcome == 'cache_hit'}",
        f"prompt_tokens={trace.prompt} completion_tokens={trace.completion}",
    )
    return " ".join(parts)


# =============================================================================
# 26. Lessons
# =============================================================================

# Places in the bodies of all dialects that may go without changing what is asked ("*" = every
# member of a list). What is not listed is never left out.
SPARE: Final = tuple(
    tuple(place.split("."))
    for place in (
        # how the words are chosen
        "temperature", "top_p", "top_k", "min_p", "top_a", "typical_p", "repetition_penalty",
        "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "seed",
        "random_seed", "n", "stop", "stop_sequences",
        # who asks, what is kept, what it may cost
        "user", "metadata", "metadata.user_id", "client_metadata", "store", "service_tier", "speed",
        "safety_identifier", "prediction", "prompt_cache_key", "prompt_cache_retention",
        "prompt_cache_options", "cache_control", "betas", "context_management", "encoding_format",
        "stream_options", "stream_options.include_usage", "stream_options.include_obfuscation",
        # how hard to think, how much to say
        "reasoning", "reasoning.effort", "reasoning.summary", "reasoning.max_tokens",
        "reasoning.enabled", "reasoning.exclude", "reasoning_effort", "reasoning_format",
        "include_reasoning", "enable_thinking", "chat_template_kwargs", "thinking",
        "thinking.display", "thinking.clear_thinking", "think", "clear_thinking",
        "output_config.effort", "effort", "verbosity", "text.verbosity", "include", "truncation",
        # calls and formats
        "parallel_tool_calls", "tool_choice", "max_tool_calls", "tool_stream",
        "tool_choice.disable_parallel_tool_use", "response_format.json_schema.strict",
        "response_format.json_schema.description", "text.format.strict", "modalities",
        # in messages
        "messages.*.reasoning_content", "messages.*.reasoning", "messages.*.reasoning_details",
        "messages.*.thinking", "messages.*.name", "messages.*.refusal", "messages.*.annotations",
        "messages.*.cache_control", "messages.*.phase", "messages.*.is_error",
        "messages.*.extra_content", "messages.*.tool_calls.*.extra_content",
        "messages.*.tool_calls.*.index", "messages.*.content.*.cache_control",
        "messages.*.content.*.content.*.cache_control", "messages.*.content.*.caller",
        "messages.*.content.*.citations", "messages.*.content.*.annotations",
        "system.*.cache_control", "system.*.citations", "input.*.phase", "input.*.status",
        "input.*.content.*.annotations", "input.*.content.*.logprobs",
        # in tools
        "tools.*.function.strict", "tools.*.strict", "tools.*.cache_control",
        "tools.*.function.cache_control", "tools.*.defer_loading", "tools.*.input_examples",
        "tools.*.allowed_callers", "tools.*.eager_input_streaming",
    )
)  # fmt: skip
# Some may go only while they say what is so without them.
SPARE_ONLY: Final[Mapping[str, tuple[object, ...]]] = {
    "n": (1,),
    "tool_choice": ("auto", {"type": "auto"}),
    "modalities": (["text"],),
    "encoding_format": ("float",),
    "messages.*.is_error": (False,),
    "messages.*.refusal": (None, ""),
    "tools.*.defer_loading": (False,),
    "messages.*.content.*.citations": (None, []),
    "system.*.citations": (None, []),
}
# What one model takes and another refuses: of these the value that was refused may go.
WORDED: Final = frozenset((
    "temperature", "top_p", "reasoning.effort", "reasoning.summary", "reasoning_effort",
    "output_config.effort", "effort", "verbosity", "text.verbosity", "service_tier", "truncation",
    "include", "prompt_cache_retention", "reasoning_format", "thinking", "tool_choice",
))  # fmt: skip
OTHER_LIMIT: Final = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
MAX_BUDGET_SHARE: Final = 2  # thinking gets half of a limit that had to be lowered
LEAST_BUDGET: Final = 1024  # Anthropic's smallest thinking.budget_tokens
LASTING: Final = frozenset(("drop", "rename", "most", "tell format"))


class Mend(NamedTuple):
    """One change to a body that a provider refused.

    `kind` is a row of MENDERS. `value` is the new name of a rename, a number of tokens, the
    dialect, or the only value that must go, as JSON ("" = any).
    """

    kind: str
    path: tuple[str, ...] = ()
    value: str | int = ""

    @property
    def lasting(self) -> bool:
        """Is it true of the model, and not of this one request?"""
        return self.kind in LASTING

    def __str__(self) -> str:
        place = ".".join(self.path)
        said = {
            "drop": f"{place} left out" + (f" where it is {self.value}" if self.value else ""),
            "drop once": f"{place} left out",
            "rename": f"{place} sent as {self.value}",
            "most": f"at most {self.value} tokens of output",
            "room": f"{place} lowered to {self.value}",
            "tell format": "response_format told in words",
            "no thoughts": "earlier reasoning left out",
            "think not": "thinking turned off",
        }
        return said[self.kind]


def mended(raw: bytes, mends: Sequence[Mend]) -> bytes:
    """A body with these changes; the very same bytes where none of them applies."""
    body = read_json(raw) if any(may_concern(raw, mend) for mend in mends) else None
    if not isinstance(body, dict):
        return raw
    changes = [MENDERS[mend.kind](body, mend) for mend in mends]
    return dump_json(body) if any(changes) else raw


def may_concern(raw: bytes, mend: Mend) -> bool:
    """A fast look: does the name stand in the bytes, if perhaps in a text?"""
    if not mend.path or mend.kind == "room":
        return True
    return b'"%b"' % mend.path[-1].encode() in raw or b"\\u00" in raw


def drop_member(body: Json, mend: Mend) -> bool:
    found = list(holders(body, mend))
    for holder in found:
        del holder[mend.path[-1]]
    return bool(found)


def holders(body: Json, mend: Mend) -> Iterator[Json]:
    """The objects that hold what is to go, where it may go."""
    nodes: list[Any] = [body]
    for name in mend.path[:-1]:
        if name == "*":
            nodes = [child for node in nodes for child in as_list(node)]
        else:
            nodes = [node[name] for node in nodes if isinstance(node, dict) and name in node]
    for node in nodes:
        if isinstance(node, dict) and mend.path[-1] in node and may_go(node[mend.path[-1]], mend):
            yield node


def may_go(value: object, mend: Mend) -> bool:
    fine = SPARE_ONLY.get(".".join(mend.path))
    if fine is not None and not any(same_json(value, other) for other in fine):
        return False
    return not mend.value or short_json(value) == mend.value


def same_json(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other  # True == 1


def rename_member(body: Json, mend: Mend) -> bool:
    if mend.path[0] not in body:
        return False
    value = body.pop(mend.path[0])
    body.setdefault(str(mend.value), value)
    return True


def lower_output(body: Json, mend: Mend) -> bool:
    """No limit above what the provider takes; a body without one stays without."""
    most, changed = int(mend.value), False
    for name in OUTPUT_LIMITS:
        if is_integer(body.get(name)) and body[name] > most:
            body[name], changed = most, True
    if changed:
        lower_budget(body, most)
    return changed


def give_room(body: Json, mend: Mend) -> bool:
    """For one request: a limit that leaves room for the prompt, or that the credit covers."""
    name, value = mend.path[0], int(mend.value)
    if body.get(name) == value:
        return False
    body[name] = value
    lower_budget(body, value)
    return True


def lower_budget(body: Json, most: int) -> None:
    """Anthropic: thinking.budget_tokens must be below max_tokens, and no less than 1024."""
    thinking = as_dict(body.get("thinking"))
    budget = thinking.get("budget_tokens")
    if not is_number(budget) or cast(int, budget) < most:
        return
    if most // MAX_BUDGET_SHARE < LEAST_BUDGET:
        del body["thinking"]
    else:
        body["thinking"] = {**thinking, "budget_tokens": most // MAX_BUDGET_SHARE}


def tell_format(body: Json, _mend: Mend) -> bool:
    """An answer format that is refused, as an instruction."""
    wanted, messages = body.get("response_format"), body.get("messages")
    if not isinstance(wanted, dict) or not messages or not isinstance(messages, list):
        return False
    if not all(isinstance(message, dict) and "role" in message for message in messages):
        return False
    if wants_json(body):
        body["messages"] = with_instruction(messages, format_in_words(wanted))
    del body["response_format"]
    return True


OPAQUE: Final = frozenset(("thinking", "redacted_thinking", "think", "reasoning"))
REPLAYED: Final = ("reasoning_content", "reasoning", "reasoning_details", "thinking")
# Responses pairs these with the reasoning before them by their ids.
PAIRED: Final = frozenset(("message", "function_call", "custom_tool_call"))


def strip_thoughts(body: Json, mend: Mend) -> bool:
    """Every piece of earlier reasoning goes; Anthropic's thinking too where it needs them.

    With the value "sign" the first call of each turn gets Gemini's stand-in for a signature.
    """
    before = [body.get("messages"), body.get("input")]
    after = [stripped_messages(before[0], mend.value == "sign"), stripped_input(before[1])]
    for name, made in zip(("messages", "input"), after, strict=True):
        if name in body:
            body[name] = made
    if after == before:
        return False
    thinking = as_dict(body.get("thinking")).get("type")
    if thinking == "enabled" and isinstance(after[0], list) and loses_thought(body):
        del body["thinking"]
    return True


def stripped_messages(messages: Any, sign: bool) -> Any:
    if not isinstance(messages, list):
        return messages
    made = [stripped_message(m, sign) if isinstance(m, dict) else m for m in messages]
    return [message for message in made if message is not None]


def stripped_message(message: Json, sign: bool) -> Json | None:
    """A message without reasoning; None if it was nothing else."""
    out = without(message, REPLAYED)
    content = out.get("content")
    if isinstance(content, list):
        out["content"] = [p for p in content if as_dict(p).get("type") not in OPAQUE]
        if content and not out["content"]:
            if not out.get("tool_calls"):
                return None
            out["content"] = None
    if isinstance(calls := out.get("tool_calls"), list):
        out["tool_calls"] = [unsigned_call(c, sign and at == 0) for at, c in enumerate(calls)]
    return out


def unsigned_call(call: Any, sign: bool) -> Any:
    """A call without Gemini's signature, or with the stand-in for one."""
    if not isinstance(call, dict):
        return call
    bare = without(call, ("extra_content",))
    stand_in = {"google": {"thought_signature": NO_SIGNATURE}}
    return {**bare, "extra_content": stand_in} if sign else bare


def stripped_input(items: Any) -> Any:
    if not isinstance(items, list) or not any(is_thought(item) for item in items):
        return items
    return [
        without(item, ("id",)) if as_dict(item).get("type") in PAIRED else item
        for item in items
        if not is_thought(item)
    ]


def is_thought(item: object) -> bool:
    return as_dict(item).get("type") == "reasoning"


def go_unthinking(body: Json, mend: Mend) -> bool:
    """The provider misses reasoning that nobody has any more: this answer does without."""
    if mend.value != "chat":
        return body.pop("thinking", None) is not None
    changed = body.get("thinking") != {"type": "disabled"}
    body["thinking"] = {"type": "disabled"}  # deepseek, kimi, z.ai (2026-11)
    for name in ("reasoning_effort", "reasoning"):
        changed = body.pop(name, None) is not None or changed
    return changed


MENDERS: Final[Mapping[str, Callable[[Json, Mend], bool]]] = {
    "drop": drop_member,
    "drop once": drop_member,
    "rename": rename_member,
    "most": lower_output,
    "room": give_room,
    "tell format": tell_format,
    "no thoughts": strip_thoughts,
    "think not": go_unthinking,
}

# -- what a refusal says ---------------------------------------------------------

MAX_READ_CHARS: Final = 6000
MAX_READ_NODES: Final = 400
NAME: Final = r"[A-Za-z_$][\w$.\[\]\-]{0,160}"
NAMES: Final = (
    rf"[\s:`'\"\[(]{{0,6}}({NAME}(?:[`'\"\])]*(?:,| and| or)[\s`'\"]{{1,4}}{NAME}){{0,20}})"
)
MEMBER: Final = r"(?:parameter|argument|field|propert(?:y|ies)|key|option|input|member)s?"
REFUSES: Final = r"(?:is|are) (?:un|not )(?:supported|permitted|allowed|recognized|available|known)"
# A member that the provider does not know or take (recorded or reported, 2025-03 to 2026-11).
UNKNOWN_MEMBER: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # Gemini
        rf"unknown name \W{{0,2}}(?P<names>{NAME})(?:\W{{1,3}}at '(?P<at>[^']{{1,160}})')?",
        # OpenAI, NVIDIA, Codex, Venice, Azure, Python
        rf"(?:un(?:supported|known|recogni[sz]ed|expected)|extra) (?:\w+ )?{MEMBER}(?:\(s\))?"
        rf"(?: supplied| in \w+)?:?{NAMES}",
        # Groq
        rf"(?:'(?P<at>[\w.\[\]]{{1,160}})' ?: )?propert(?:y|ies) {NAMES}[`'\"]* {REFUSES}",
        # xAI
        rf"arguments?(?:\(s\))? not supported[\w ]{{0,30}}:{NAMES}",
        # Anthropic, Fireworks, pydantic as text
        rf"(?P<names>{NAME})[`'\"]?:?\s+extra {MEMBER} (?:are |is )?not (?:permitted|allowed)",
        rf"not (?:permitted|allowed),? (?:field|param\w*|key)s?:?{NAMES}",
        r"'extra_forbidden', 'loc': \((?P<loc>[^)]{1,300})\)",
        rf"additional propert(?:y|ies)(?: are not allowed \()?{NAMES}",
        # in plain words
        rf"does(?: not|n't) support (?:the |{MEMBER}:? )*{NAMES}",
        rf"[`'\"](?P<names>{NAME})[`'\"](?: parameter| field| argument)? {REFUSES}",
        rf"(?:parameter|argument|field) {NAMES}[`'\"]* {REFUSES}",
        rf"[`'\"](?P<names>{NAME})[`'\"] of type [`'\"]?\w{{1,40}}[`'\"]? {REFUSES}",
        rf"[`'\"](?P<names>{NAME})[`'\"] is deprecated for this model",
        r"(?P<names>response_format) type is unavailable",
    )
)
# True of this request only: of the others in it.
UNFIT_TOGETHER: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"(?P<names>{NAME})[`'\"]? cannot both be specified",
        rf"[`'\"](?P<names>{NAME})[`'\"] may only be set to [\d.]+ when",
    )
)
# A value that this model does not take, though it knows the member.
REFUSED_VALUE: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"unsupported value:{NAMES}",
        rf"(?P<names>{NAME})[`'\"]? does not support [^.]{{1,60}} with this model",
        rf"invalid (?P<names>{NAME}): only [\d.]+ is allowed",
    )
)
ONLY_DEFAULT: Final = re.compile(r"only the default|only 1(?:\.0)? is (?:allowed|supported)", re.I)
USE_INSTEAD: Final = re.compile(rf"use [`'\"]?(?P<names>{NAME})[`'\"]? instead", re.IGNORECASE)
UNKNOWN_CODES: Final = frozenset((
    "unsupported_parameter", "unknown_parameter", "unrecognized_parameter", "unexpected_parameter",
    "extra_forbidden", "value_error.extra", "unrecognized_keys", "property_unsupported",
))  # fmt: skip
VALUE_CODES: Final = frozenset(("unsupported_value", "invalid_value"))
# What only says where the body begins.
ENTRANCES: Final = frozenset((
    "body", "root", "request", "request_body", "params", "generation_config", "extra_body",
    "inference_config", "chat_completion_request",
))  # fmt: skip
SAME_PLACES: Final = {
    "contents": "messages", "function_declarations": "function", "tool": "tools",
    "message": "messages",
}  # fmt: skip
# Reasoning that the provider cannot verify, or that it wants to see again.
BAD_THOUGHTS: Final = re.compile(
    r"invalid.{0,20}signature.{0,60}think|signature.{0,80}(?:not valid|invalid|corrupt|could not)"
    r"|(?:corrupt\w*|invalid|missing a?) ?.{0,4}thought.?signature"
    r"|thought.?signature.{0,80}(?:missing|not)"
    r"|invalid_encrypted_content"
    r"|encrypted.?content.{0,120}(?:could not|cannot|unable|invalid|not be|verif|decrypt)"
    r"|thinking\W{1,3}blocks?.{0,120}cannot be modified"
    r"|thinking\.signature"
    r"|of type 'reasoning' was provided without|without its required 'reasoning'",
    re.IGNORECASE | re.DOTALL,
)
GOOGLE_SIGNATURE: Final = re.compile(r"thought.?signature", re.IGNORECASE)
MISSING_THOUGHTS: Final = re.compile(
    r"reasoning_content.{0,100}(?:passed back|is missing|be provided|is required)"
    r"|must start with a thinking block|expected .{0,4}thinking.{0,40} but found",
    re.IGNORECASE | re.DOTALL,
)
NUMBER: Final = r"(\d[\d,_]{0,14})"
CAPS: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"max_\w{{0,20}}tokens\W{{1,4}}\d+ > {NUMBER}, which is the maximum",
        rf"supports at most {NUMBER} (?:completion|output)",
        r"max(?:imum)?[ _](?:\w{1,20}[ _])?tokens?[^.]{0,60}"
        rf"(?:less than or equal to|at most|no more than|not exceed|<=|≤)\W{{1,4}}{NUMBER}",
        rf"range of max_\w{{0,20}}tokens[^\[]{{0,20}}\[\d+, ?{NUMBER}\]",
        rf"max\w{{0,20}}tokens value of \d+ but the supported range is [\w ]+\(\w+\) to {NUMBER}",
    )
)
AFFORDABLE: Final = (re.compile(rf"can only afford {NUMBER}", re.IGNORECASE),)
# A shorter answer than this is not worth having instead of somebody else's.
LEAST_OUTPUT: Final = 256


class Sizes(NamedTuple):
    """Tokens as an overflow states them; 0 = not stated."""

    asked: int = 0  # of the prompt
    most: int = 0  # the model takes in all
    output: int = 0  # were reserved for the answer

    @property
    def needs(self) -> int:
        """The window that would have done, as far as can be told."""
        return max(self.asked + self.output, self.most + 1 if self.most else 0)


# In the order to look for them.
MOST: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"tokens > {NUMBER} maximum",
        rf"exceed context limit: [\d,]+ \+ [\d,]+ > {NUMBER}",
        rf"maximum number of tokens allowed \(?{NUMBER}",
        rf"maximum (?:context|prompt|input) (?:length|size|window) (?:is|of) (?:only )?{NUMBER}",
        rf"with {NUMBER} maximum context length",
        rf"n_ctx\W{{1,4}}{NUMBER}",
        rf"context (?:length|window|size)(?: limit)?(?: is| of)?(?: only)?:? \(?{NUMBER} ?tokens",
        rf"limit (?:of|for this model is) {NUMBER}(?![\d,]|\s?(?:[kmg]?b\b|byte|char|request))",
        rf"limit {NUMBER}, requested",
    )
)
ASKED: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"{NUMBER} tokens > [\d,]+ maximum",
        rf"exceed context limit: {NUMBER} \+",
        rf"token count (?:of |\(){NUMBER}",
        rf"{NUMBER} in the (?:messages|prompt)",
        rf"(?:request|prompt|messages?) (?:has|contains?|resulted in)(?: at least)? {NUMBER} "
        r"(?:input )?tokens",
        rf"n_prompt_tokens\W{{1,4}}{NUMBER}",
        rf"(?:request|prompt) \({NUMBER} tokens\)",
        rf"limit [\d,]+, requested {NUMBER}",
        rf"you requested(?: about)? {NUMBER} tokens",
    )
)
RESERVED: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"exceed context limit: [\d,]+ \+ {NUMBER} >",
        rf"{NUMBER} in the completion",
        rf"requested {NUMBER} output tokens",
        rf"plus {NUMBER} '?max_tokens",
        rf"is too large: {NUMBER}",
    )
)
WINDOW_RANGE: Final = range(256, 100_000_001)


def stated_sizes(text: str) -> Sizes:
    """The sizes in the text of an overflow."""
    asked, most, output = (number_in(patterns, text) for patterns in (ASKED, MOST, RESERVED))
    return Sizes(asked, most if most in WINDOW_RANGE else 0, output)


def number_in(patterns: Iterable[re.Pattern[str]], text: str) -> int:
    """The number that the first pattern with a match finds; 0 = none."""
    for pattern in patterns:
        if match := pattern.search(text):
            return int(re.sub("[,_]", "", match[1]))
    return 0


def remedy(
    outcome: Outcome, refusal: bytes, sent: bytes, dialect: str, done: Sequence[Mend] = ()
) -> list[Mend]:
    """What to change in the body `sent` so that the provider takes it; [] = nothing helps.

    `refusal` is the error body (b"" when the error came inside a 200), `done` what was changed
    already. Only changes that make a difference are given, and no protected member goes.
    """
    body = read_json(sent) if outcome.status in REMEDIES else None
    if not isinstance(body, dict):
        return []
    error = read_json(refusal) if refusal else None
    text = words_of(outcome, refusal, error)
    for find in REMEDIES[outcome.status]:
        found = dict.fromkeys(find(Refusal(text, error, body, dialect, done)))
        mends = [mend for mend in found if mend not in done]
        if mended(sent, mends) != sent:
            return mends
    return []


class Refusal(NamedTuple):
    """What a provider said, and what it said it of."""

    text: str
    error: Any  # the error body, parsed
    body: Json  # what was sent
    dialect: str
    done: Sequence[Mend] = ()


def words_of(outcome: Outcome, refusal: bytes, error: object) -> str:
    """Message, codes and numbers in one text; Outcome.text alone is cut short."""
    told = dig_message(error) or refusal[: 4 * MAX_READ_CHARS].decode("utf-8", "replace")
    counts = (  # llama.cpp's are members of their own
        f"{name}: {node[name]}"
        for node in objects_within(error)
        for name in ("n_ctx", "n_prompt_tokens")
        if is_integer(node.get(name))
    )
    text = " ".join((told[:MAX_READ_CHARS], outcome.text, outcome.code, *counts))
    return text.replace("response format", "response_format")


def about_thoughts(refusal: Refusal) -> Iterator[Mend]:
    if MISSING_THOUGHTS.search(refusal.text):
        yield Mend("think not", (), refusal.dialect)
    elif BAD_THOUGHTS.search(refusal.text):
        signed = GOOGLE_SIGNATURE.search(refusal.text) and refusal.dialect == "chat"
        yield Mend("no thoughts", (), "sign" if signed else "")


def about_room(refusal: Refusal) -> Iterator[Mend]:
    """Prompt and answer together are too long, but the prompt alone is not."""
    sizes = stated_sizes(refusal.text)
    held = [refusal.body[n] for n in OUTPUT_LIMITS if is_integer(refusal.body.get(n))]
    output = sizes.output or max(held, default=0)
    if not sizes.asked or "at least" in refusal.text:
        return
    # Counting again may give a few tokens more.
    room = sizes.most - sizes.asked - max(16, sizes.most // 500)
    if LEAST_OUTPUT <= room < output:
        yield from limited_to(room, refusal)


def about_credit(refusal: Refusal) -> Iterator[Mend]:
    """OpenRouter reserves the price of max_tokens (oh-my-pi#9569, 2026-08)."""
    affordable = number_in(AFFORDABLE, refusal.text)
    if affordable >= LEAST_OUTPUT:
        yield from limited_to(affordable, refusal)


def limited_to(tokens: int, refusal: Refusal) -> Iterator[Mend]:
    """The limits the body has, or else the dialect's own one, set for this request."""
    default = {"chat": "max_tokens", "messages": "max_tokens", "responses": "max_output_tokens"}
    held = [name for name in OUTPUT_LIMITS if is_integer(refusal.body.get(name))]
    for name in held or [default[d] for d in default if d == refusal.dialect]:
        if name not in held or refusal.body[name] > tokens:
            yield Mend("room", (name,), tokens)


def about_limits(refusal: Refusal) -> Iterator[Mend]:
    """A smaller max_tokens is asked for, whatever the prompt."""
    most = number_in(CAPS, refusal.text)
    for node in objects_within(refusal.error):
        place = [part for part in as_list(node.get("loc")) if isinstance(part, str)]
        ceiling = as_dict(node.get("ctx")).get("le")
        if place and place[-1] in OUTPUT_LIMITS and is_integer(ceiling):
            most = cast(int, ceiling)
    if "(exclusive)" in refusal.text:
        most -= 1
    if most >= 1:
        yield Mend("most", (), most)


def about_members(refusal: Refusal) -> Iterator[Mend]:
    """Every member that the refusal names and that may go."""
    for path in members_named(refusal):
        yield from mends_for(path, refusal)
    for path in values_named(refusal):
        yield from mends_for(path, refusal, value=True)
    for pattern in UNFIT_TOGETHER:
        for path in paths_in(pattern, refusal.text):
            for mend in mends_for(path, refusal):
                if mend.kind == "drop":
                    yield mend._replace(kind="drop once")


def members_named(refusal: Refusal) -> Iterator[list[str]]:
    """Paths of members that are said to be unknown or unsupported."""
    for node in objects_within(refusal.error):
        word, param = code_of(node), node.get("param")
        if word in UNKNOWN_CODES and isinstance(param, str):
            yield path_of(param)
        loc = node.get("loc") if word in UNKNOWN_CODES else None
        if isinstance(loc, list):
            yield path_of(".".join(str(part) for part in loc))
        path = ".".join(str(part) for part in as_list(node.get("path")))
        for key in as_list(node.get("keys")) if word in UNKNOWN_CODES else ():
            yield path_of(f"{path}.{key}")
    for pattern in UNKNOWN_MEMBER:
        yield from paths_in(pattern, refusal.text)


def values_named(refusal: Refusal) -> Iterator[list[str]]:
    """Paths of members whose value this model does not take."""
    for node in objects_within(refusal.error):
        param = node.get("param")
        if code_of(node) in VALUE_CODES and isinstance(param, str):
            yield path_of(param)
    for pattern in REFUSED_VALUE:
        yield from paths_in(pattern, refusal.text)


def code_of(node: Json) -> str:
    """The first of a node's words that tells what is wrong with a member."""
    words = (w for w in (node.get("code"), node.get("type")) if isinstance(w, str))
    return next((w for w in words if w in UNKNOWN_CODES or w in VALUE_CODES), "")


def objects_within(value: Any) -> Iterator[Json]:
    """Objects at any depth, those inside texts that are JSON themselves too; bounded."""
    todo: deque[Any] = deque([value])
    for _ in range(MAX_READ_NODES):
        if not todo:
            return
        node = todo.popleft()
        if isinstance(node, str) and node[:1] in ("{", "[") and len(node) < 65_536:
            node = read_json(node.encode("utf-8", "replace"))
        if isinstance(node, dict):
            yield node
            todo.extend(node.values())
        elif isinstance(node, list):
            todo.extend(node[:50])


def paths_in(pattern: re.Pattern[str], text: str) -> Iterator[list[str]]:
    """The paths that matches of `pattern` name: one or a list of them, perhaps `at` a place."""
    for match in itertools.islice(pattern.finditer(text), 20):
        found = match.groupdict()
        if found.get("loc"):
            yield path_of(found["loc"].replace("'", "").replace(", ", "."))
            continue
        named = found.get("names") or match.group(match.lastindex or 0)
        at = f"{found['at']}." if found.get("at") else ""
        for name in re.split(r"[\s`'\",()]+", named):
            if name not in ("and", "or", ""):
                yield path_of(at + name)


def path_of(text: str) -> list[str]:
    """`messages[3].reasoningContent` as ["messages", "reasoning_content"]."""
    parts = re.findall(r"[A-Za-z_$][\w$-]*", text)
    names = [re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", part).lower() for part in parts]
    names = [SAME_PLACES.get(name, name) if len(names) > 1 else name for name in names]
    while len(names) > 1 and names[0] in ENTRANCES:
        names.pop(0)
    return names


def mends_for(names: list[str], refusal: Refusal, value: bool = False) -> Iterator[Mend]:
    """What to do about one member named by a refusal; nothing if it may not go."""
    if not names or names[-1] in OUTPUT_LIMITS:
        yield from () if value else limit_mends(names, refusal)
        return
    if names[0] == "response_format" and not value and not spare_places(names):
        if refusal.dialect == "chat" and "response_format" in refusal.body:
            yield Mend("tell format", ("response_format",))
        return
    for end in range(len(names), 0, -1):  # an unknown part of a spare member takes it along
        places = spare_places(names[:end], whole=end == len(names))
        found = [Mend("drop", place) for place in places]
        if value:
            found = [bound_to_value(m, refusal) for m in found if ".".join(m.path) in WORDED]
        held = [mend for mend in found if any(holders(refusal.body, mend))]
        if held:
            top = [mend for mend in held if len(names) == 1 and len(mend.path) == 1]
            yield from top or held
            return


def spare_places(names: Sequence[str], whole: bool = True) -> list[tuple[str, ...]]:
    """The spare places that a path of names may mean: some providers add names of their own.

    A name that stands alone may be anywhere; one that began a longer path is the body's.
    """
    if len(names) == 1:
        return [p for p in SPARE if p[-1] == names[0] and (whole or len(p) == 1)]
    return [
        place
        for place in SPARE
        if place[0] == names[0]
        and place[-1] == names[-1]
        and is_within([part for part in place if part != "*"], names)
    ]


def is_within(place: Sequence[str], names: Sequence[str]) -> bool:
    """Do all parts of `place` stand in `names`, in this order?"""
    left = iter(names)
    return all(part in left for part in place)


def bound_to_value(mend: Mend, refusal: Refusal) -> Mend:
    """Only the value that was refused goes, unless the text says that every value would be."""
    if ONLY_DEFAULT.search(refusal.text):
        return mend
    node: Any = refusal.body
    for name in mend.path:
        node = as_dict(node).get(name)
    return mend._replace(value=short_json(node))


def limit_mends(names: list[str], refusal: Refusal) -> Iterator[Mend]:
    """max_tokens under its other name; if that is refused as well, left out."""
    if len(names) != 1 or names[0] not in refusal.body:
        return
    old, dialect = names[0], refusal.dialect
    hint = USE_INSTEAD.search(refusal.text)
    other = OTHER_LIMIT.get(old, "")
    if hint and hint["names"].strip(".") in OTHER_LIMIT:
        other = hint["names"].strip(".")
    tried = any(mend.kind == "rename" and mend.value == old for mend in refusal.done)
    if dialect == "chat" and other not in ("", old) and not tried:
        yield Mend("rename", (old,), other)
    elif dialect in ("chat", "responses", "codex"):
        yield Mend("drop", (old,))


# (status) -> what may be the matter, the likeliest first. 500 and 502 stand for errors inside a
# stream that name no status.
REMEDIES: Final[Mapping[int, tuple[Callable[[Refusal], Iterator[Mend]], ...]]] = {
    400: (about_thoughts, about_room, about_limits, about_members),
    402: (about_credit,),
    413: (about_room,),
    422: (about_thoughts, about_room, about_limits, about_members),
    500: (about_thoughts,),
    502: (about_thoughts,),
}

# -- what is remembered ----------------------------------------------------------


class Lessons:
    """What refusals taught about (provider, model): changes to bodies, and windows.

    One lock, held for dictionary work only; bounded; each lesson lasts a day, because providers
    change. `now` is a monotonic clock in seconds.
    """

    TTL_S: ClassVar[float] = 86_400.0
    MAX_MODELS: ClassVar[int] = 1000
    MAX_MENDS: ClassVar[int] = 32

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._lock = now, threading.Lock()
        self._mends: dict[tuple[str, str, str], dict[Mend, float]] = {}
        self._windows: dict[tuple[str, str], tuple[int, float]] = {}  # tokens, until
        self._cuts: dict[tuple[str, str], float] = {}  # cut prompts were told of, until

    def mends(self, provider: str, model: str, dialect: str) -> tuple[Mend, ...]:
        """What to change in every body before it is sent, in the order it was learnt."""
        if not self._mends:  # the usual case costs no lock
            return ()
        with self._lock:
            known, now = self._mends.get((provider, model, dialect), {}), self._now()
            return tuple(mend for mend, until in known.items() if until > now)

    def learn(self, provider: str, model: str, dialect: str, mends: Iterable[Mend]) -> None:
        """Remember what helped; of two that contradict each other the newer one holds."""
        lasting = [mend for mend in mends if mend.lasting]
        if not lasting:
            return
        with self._lock:
            now, place = self._now(), (provider, model, dialect)
            known = {m: until for m, until in self._mends.pop(place, {}).items() if until > now}
            for mend in lasting:
                known = {m: until for m, until in known.items() if not contradict(m, mend)}
                known[mend] = now + self.TTL_S
            self._mends[place] = dict(list(known.items())[-self.MAX_MENDS :])
            if len(self._mends) > self.MAX_MODELS:
                del self._mends[next(iter(self._mends))]

    def window(self, provider: str, model: str) -> int:
        """The window the provider stated, in tokens; 0 = it never did."""
        if not self._windows:
            return 0
        tokens, until = self._windows.get((provider, model), (0, 0.0))
        return tokens if until > self._now() else 0

    def learn_window(self, provider: str, model: str, tokens: int) -> None:
        if tokens not in WINDOW_RANGE:
            return
        with self._lock:
            self._windows.pop((provider, model), None)
            self._windows[provider, model] = (tokens, self._now() + self.TTL_S)
            if len(self._windows) > self.MAX_MODELS:
                del self._windows[next(iter(self._windows))]

    def disprove(self, provider: str, model: str, prompt_tokens: int) -> None:
        """An answer to so many tokens came: a smaller window was not what was stated."""
        if self._windows and prompt_tokens > (self.window(provider, model) or prompt_tokens):
            with self._lock:
                self._windows.pop((provider, model), None)

    def first_cut(self, provider: str, model: str) -> bool:
        """Is this the first prompt of the day that the model seems to have cut?"""
        with self._lock:
            place, now = (provider, model), self._now()
            if self._cuts.get(place, 0.0) > now:
                return False
            self._cuts.pop(place, None)
            self._cuts[place] = now + self.TTL_S
            if len(self._cuts) > self.MAX_MODELS:
                del self._cuts[next(iter(self._cuts))]
            return True

    def snapshot(self, provider: str) -> list[Json]:
        """What is known of one provider's models, and for how many seconds yet."""
        with self._lock:
            now = self._now()
            rows = [
                (model, dialect, str(mend), until)
                for (name, model, dialect), known in self._mends.items()
                for mend, until in known.items()
                if name == provider and until > now
            ]
            rows += [
                (model, "", f"takes {tokens} tokens in all", until)
                for (name, model), (tokens, until) in self._windows.items()
                if name == provider and until > now
            ]
        return [
            {"model": m, "dialect": d or None, "lesson": text, "for_s": math.ceil(until - now)}
            for m, d, text, until in sorted(rows)
        ]


def contradict(old: Mend, new: Mend) -> bool:
    """Both limit the output, the same, or rename to and fro."""
    if old.kind == new.kind == "rename":
        return old.path == (new.value,) or old.path == new.path
    return old == new or old.kind == new.kind == "most"


# =============================================================================
# 27. Difficulty
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
# 28. Plan
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


# Claude Code's way to ask for a long context window: `claude-opus-4-8[1m]` (seen 2026-11).
WINDOW_SUFFIX: Final = re.compile(r"\[\d+[km]\]$", re.IGNORECASE)


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

    @functools.cached_property
    def dialects(self) -> tuple[str, ...]:
        """What it speaks, the usual one first."""
        row = self.service.provider
        if row.responses_only and re.search(row.responses_only, self.model.lower()):
            return ("responses",)
        return row.dialects

    @functools.cached_property
    def fit(self) -> Fit:
        """What its provider asks of a chat body for this model."""
        return fit_for(self.service.name, self.model)

    @property
    def goes_on(self) -> bool:
        """Whether it continues a last message of the assistant instead of answering it."""
        if self.dialects[0] == "messages":
            return self.claude.prefill
        return bool(self.fit.quirk.prefill) and self.dialects[0] == "chat"

    @functools.cached_property
    def claude(self) -> ClaudeTraits:
        limits = (self.facts.max_output, self.service.max_output_tokens)
        return claude_traits(self.model, min((n for n in limits if n), default=None))


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


def listed_window(target: Target) -> int:
    return target.facts.window or 0


class Limits(NamedTuple):
    """The size of a request against what a target takes."""

    tokens: int
    health: Callable[[str], int]  # provider -> 0 well, 1 shaky, 2 ill
    is_open: Callable[[str], bool]
    window: Callable[[Target], int] = listed_window  # tokens it takes in all; 0 = unknown


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


class Arrangement(NamedTuple):
    """What the candidates of one request were planned from."""

    lead: Sequence[Target]
    groups: Sequence[Group]
    turn: int
    traits: Traits

    def order(self) -> list[Candidate]:
        """Every candidate with its reason, whatever the health of anybody."""
        rest = (
            Candidate(target, ranking(target))
            for group in self.groups
            for equals in group
            for target in rotated(equals, self.turn)
        )
        every = [*(Candidate(target, "named by the client") for target in self.lead), *rest]
        return list({candidate.target.label: candidate for candidate in reversed(every)}.values())[
            ::-1
        ]


def why_not(target: Target, traits: Traits, tokens: int) -> str:
    """Why a target is no candidate for a request; "" when nothing speaks against it."""
    local = target.service.provider.tier == "local"
    reasons = (
        (traits.scope and target.provider not in traits.scope, "not within this key's providers"),
        (traits.profile == "local" and not local, "not local"),
        (traits.tools and not target.tools, "does not support tools"),
        (traits.vision and not target.vision, "does not read images"),
        (too_large(target, tokens), f"takes at most {target.service.skip_tokens_over} tokens"),
    )
    return next((why for holds, why in reasons if holds), "")


def ranking(target: Target) -> str:
    return f"rating {target.facts.rating}, cost {target.cost}"


def plan(
    lead: Sequence[Target], groups: Sequence[Group], limits: Limits, turn: int, why: str
) -> Iterator[Candidate]:
    """Candidates in the order to try them, each with its reason; nothing is computed ahead.

    Models whose window is too small come late, providers whose breaker is open last of all;
    requests above a provider's ceiling are not sent there at all.
    """
    late: list[Candidate] = []
    opened: list[Candidate] = []
    seen: set[str] = set()
    for candidate in itertools.chain(
        (Candidate(t, why) for t in lead), ordered(groups, limits, turn)
    ):
        target = candidate.target
        if target.label in seen or too_large(target, limits.tokens):
            continue
        seen.add(target.label)
        if limits.is_open(target.provider):
            opened.append(candidate)
        elif 0 < limits.window(target) < limits.tokens:
            late.append(candidate._replace(why=candidate.why + ", window too small"))
        else:
            yield candidate
    yield from sorted(late, key=lambda candidate: -limits.window(candidate.target))
    yield from (c._replace(why=c.why + ", its breaker is open") for c in opened)


def ordered(groups: Sequence[Group], limits: Limits, turn: int) -> Iterator[Candidate]:
    """Group by group: the well before the ill, equals in turn."""
    for group in groups:
        turned = [t for equals in group for t in rotated(equals, turn)]
        if any(limits.health(t.provider) for t in turned):
            turned.sort(key=lambda t: limits.health(t.provider))
        for target in turned:
            yield Candidate(target, ranking(target))


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

    def choose(self, model: str, fallback: bool = False) -> Choice:
        """The ladder: router ids, provider/model, alias, configured id, prefix, else smart.

        `fallback`: the client allows other models whatever STRICT_MODEL says.
        """
        model = WINDOW_SUFFIX.sub("", model.strip())
        name = model.lower()
        base, _, profile = name.rpartition(":")
        routers = {self._config.router_model_id.lower(), "hermes-router", "auto"}
        if not name or name in routers:
            return Choice()
        if base in routers and profile in ("fast", "local"):
            return Choice(profile=profile, why=f"profile {profile}")
        if name == "dummy" and self._config.echo_fallback:
            return Choice(echo=True)
        return self._named(model, name, fallback or not self._config.strict_model)

    def _named(self, model: str, name: str, spill: bool) -> Choice:
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
# 29. Verdicts
# =============================================================================

Next = Literal["key", "model", "provider", "stop"]


@dataclass(frozen=True)
class Verdict:
    """What one outcome means: who rests for how long, does the breaker hear of it, what next.

    `rests`: "route" = this (key, model), "key" = the key (and so the account behind it) for every
    model, "model" = the model for every key, "provider" = all of it, "" = nobody. It rests as
    long as the provider stated if `heeds`, else `until` the provider's next day or the next
    month, else `rest_s` seconds. `counts`: True = a failure of the provider's health. `advice`
    says what a person can do about it.
    """

    name: str
    rests: Literal["", "route", "key", "model", "provider"] = ""
    rest_s: float = 0.0
    counts: bool = False
    then: Next = "model"
    until: Literal["", "day", "month"] = ""
    heeds: bool = True
    advice: str = ""


class Rule(NamedTuple):
    """First match wins: a status (or range), then words in the provider's reason and codes."""

    statuses: range | frozenset[int]
    words: re.Pattern[str] | None
    verdict: Verdict


def codes(*statuses: int) -> frozenset[int]:
    return frozenset(statuses)


# --- words ---
# All are looked for in at most 1,200 characters: a scrubbed reason and its code words, where
# #1302 is a number given as a code. Each alternative tells whose it is, and where it was seen.

# Too long for the model, or for what a minute may hold: waiting never helps.
OVERFLOW_WORDS: Final = re.compile(
    r"context_length_exceeded|context.?window.?exceeded"  # openai, cerebras; litellm
    r"|maximum context length|context length exceeded"  # openai, vllm, deepseek
    r"|exceeds?.{0,60}context (?:length|window|size)"  # openai Responses, llama.cpp
    r"|greater than the context length|context the overflows"  # LM Studio (2026-10)
    r"|exceed_context_size|available context size"  # llama.cpp (2026-10)
    r"|prompt is too long|input is too long|prompt too long"  # anthropic, bedrock
    r"|input length and .max_tokens. exceed"  # anthropic
    r"|input token count.{0,40}exceeds|exceeds the maximum number of tokens"  # gemini
    r"|prompt token count of \d+ exceeds|model_max_prompt_tokens_exceeded"  # github copilot
    r"|exceeds max(?:imum)? (?:length|input)|#1261\b"  # zai (freellmapi#873)
    r"|too many (?:input )?tokens in|prompt contains \d+ tokens.{0,80}too large"  # cohere, mistral
    r"|too large for model",
    re.IGNORECASE,
)
# One request larger than the tokens of a minute: groq as a 413, openai as a 429 (continue#10602).
TOO_BIG_WORDS: Final = re.compile(r"request (?:is )?too large", re.IGNORECASE)
# "Limit 7000, Used 0, Requested ~12903" (groq, Fabric#364): it would not fit an empty minute.
SIZES: Final = re.compile(r"\blimit (\d{1,12}), used \d+, requested ~?(\d{1,12})", re.IGNORECASE)
NO_TIER_WORDS: Final = re.compile(
    r"\blimit: 0(?![\d.])"  # gemini: not in the free tier at all (continue#10062, #12643)
    r"|FreeTierOnly|free tier of the model"  # alibaba (2026)
    r"|not yet include access|#1311\b",  # zai coding plans (api-code page, 2026-09)
    re.IGNORECASE,
)
# Only what says that money is gone: ordinary rate limits advertise billing pages and credits.
CREDIT_WORDS: Final = re.compile(
    r"insufficient[ _]?(?:quota|balance|funds)|#1113\b"  # openai, deepseek, zai's 429
    r"|used all available credits|monthly spending limit"  # xai, as 429 and 403 (koan#2412)
    r"|payment.{0,10}past due|billing_not_active|billing.?hard.?limit"  # ollama cloud, openai
    r"|credit balance is too low"  # anthropic's 400
    r"|exceeded_current_quota|account.{0,80}\bsuspended due to"  # moonshot
    r"|#1309\b",  # zai: the subscription ended
    re.IGNORECASE,
)
MONTH_CREDIT_WORDS: Final = re.compile(  # huggingface (agents-course#386)
    r"monthly included credits|monthly credits", re.IGNORECASE
)
AFFORD_WORDS: Final = re.compile(  # openrouter (oh-my-pi#9569): a smaller max_tokens would do
    r"can only afford [1-9]", re.IGNORECASE
)
CONCURRENCY_WORDS: Final = re.compile(
    r"concurren|parallel requests|in.?flight requests"  # moonshot, ollama cloud, scaleway, zai
    r"|#1302\b",  # zai: one request at a time on the free models (ccs#402)
    re.IGNORECASE,
)
OVERLOAD_WORDS: Final = re.compile(
    r"overloaded|#1305\b|#1312\b"  # anthropic, gemini, moonshot; zai (hermes-agent#47685)
    r"|high (?:traffic|demand|load)|queue_exceeded"  # cerebras
    r"|worker local"  # nvidia: a worker's queue is full (new-api#6619)
    r"|slow_down|too busy|at capacity|temporarily unavailable"  # openai, deepseek
    r"|system load",
    re.IGNORECASE,
)
# One model is short of capacity for everybody: other keys meet the same.
MODEL_BUSY_WORDS: Final = re.compile(
    r"capacity exceeded for this model"  # mistral (continue#6185)
    r"|temporarily rate-limited upstream",  # openrouter's free models
    re.IGNORECASE,
)
FULL_WORDS: Final = re.compile(r"resource.?exhausted|request limit reached", re.IGNORECASE)
MINUTE_WORDS: Final = re.compile(
    r"per[ _-]?(?:minute|second|hour)|per[ _-](?:min|sec)\b|/ ?(?:min|minute|sec|second|hour)\b"
    r"|\b(?:RPM|TPM|RPS)\b",
    re.IGNORECASE,
)
# Gemini's retryDelay beside a day's quota is meaningless (void#557: 5 s for 25 requests a day).
GOOGLE_DAY_WORDS: Final = re.compile(r"PerDayPer|PerDay-|requests_per_model_per_day")
DAY_WORDS: Final = re.compile(
    r"per[ _-]?day|/ ?day\b|\b(?:RPD|TPD)\b"  # groq (continue#10920), openrouter, cerebras
    r"|daily|#1304\b",  # cloudflare (OmniRoute#6980), openrouter's limit_source, zai
    re.IGNORECASE,
)
ACCOUNT_DAY_WORDS: Final = re.compile(  # cloudflare counts all models together
    r"daily free allocation", re.IGNORECASE
)
PLAN_WORDS: Final = re.compile(
    r"usage_limit_reached|FreeUsageLimit"  # codex (codex2api#9), opencode (opencode#32971)
    r"|per[ _-]?(?:week|month)|/ ?(?:week|month)|weekly|monthly|5.hour",  # cohere's trial: / month
    re.IGNORECASE,
)
ACCOUNT_PLAN_WORDS: Final = re.compile(
    r"usage limit reached|weekly/monthly limit|#13(?:08|10|13)\b"  # zai (hermes-agent#103038)
    r"|(?:session|weekly|daily|hourly) usage limit"  # ollama cloud (continue#11444)
    r"|specified API usage limits"  # anthropic's 400: "you will regain access on 2026-..."
    r"|workspace_\w*limit",  # codex (subrouter#346)
    re.IGNORECASE,
)
RATE_WORDS: Final = re.compile(
    r"rate.?limit|too many requests|quota|limit reached|limit exceeded", re.IGNORECASE
)
FORBIDDEN_RATE_WORDS: Final = re.compile(
    r"rate.?limit|too many requests|quota.{0,20}exceeded|exceeded.{0,20}quota", re.IGNORECASE
)
DEAD_KEY_WORDS: Final = re.compile(
    r"api.?key (?:is )?(?:not valid|invalid|expired|disabled|revoked|deactivated)"  # gemini's 400
    r"|(?:invalid|incorrect) (?:x-)?api.?key|api_key_invalid|api_key_expired"  # xai's 400, openai
    r"|reported as leaked|consumer_suspended|has been suspended"  # google's 403
    r"|account_deactivated|account has been deactivated"  # openai
    r"|organization has been (?:disabled|restricted)",  # anthropic, groq
    re.IGNORECASE,
)
REGION_WORDS: Final = re.compile(
    r"location is not supported|not available in your (?:country|region|location)"  # gemini's 400
    r"|unsupported_country|country, region,? or territory"  # openai's 403
    r"|check your network settings",  # groq's 403 for hosters and VPNs
    re.IGNORECASE,
)
POLICY_WORDS: Final = re.compile(
    r"access_terminated|only available for coding agents",  # kimi (kimi-code#413)
    re.IGNORECASE,
)
WALL_WORDS: Final = re.compile(  # a firewall's page, not the provider (2026)
    r"attention required|just a moment\.\.\.|cloudflare|error code: 10(?:06|09|10|12|15|20)",
    re.IGNORECASE,
)
FILTER_WORDS: Final = re.compile(
    r"content_filter|content management policy|ResponsibleAIPolicy"  # azure (openclaude#273)
    r"|content_policy_violation|moderation_blocked|safety system"  # openai
    r"|content filtering policy"  # anthropic
    r"|requires moderation|input was flagged|prompt was flagged"  # openrouter's 403, openai
    r"|data_?inspection_?failed|content exists risk|considered high risk|#1301\b"  # qwen, deepseek,
    # moonshot, zai
    r"|violates usage guidelines|PROHIBITED_CONTENT|prompt was blocked",  # xai, gemini
    re.IGNORECASE,
)
# The model wrote a call or JSON that its provider refuses: another model may do better.
MISSPOKEN_WORDS: Final = re.compile(r"tool_use_failed|json_validate_failed", re.IGNORECASE)
# A 404 about what the request needs, not about the model (openrouter).
NO_ENDPOINT_WORDS: Final = re.compile(
    r"no endpoints found that (?:support|can handle)", re.IGNORECASE
)
MODEL_WORDS: Final = re.compile(
    r"model.?error|no payment|credits?\b"  # opencode's 401 (2026-09)
    r"|not supported"
    r"|promotion has ended"
    r"|subscri"
    r"|model.{0,80}(?:not found|does not exist|not exist|decommissioned|deprecated|not available)"
    r"|(?:unknown|invalid|no such) model"
    r"|model_not_found"
    r"|must be verified"  # openai: organisations, for some models
    r"|not allowed to access model",  # freellmapi#618
    re.IGNORECASE,
)
# In a 400 only plain words about the model itself: "X is not supported with this model" is
# about the request.
NO_SUCH_MODEL: Final = re.compile(
    r"model.{0,80}(?:not found|does not exist|not exist|decommissioned|not available)"
    r"|model \S+ is not supported|(?:unknown|invalid|no such) model|model_not_found"
    r"|not allowed to access model|requested model is not supported"
    r"|model identifier is invalid",  # bedrock (recorded)
    re.IGNORECASE,
)

# --- verdicts ---

OVERFLOW: Final = Verdict("context_overflow")
TOO_LARGE: Final = Verdict("too_large", then="provider")
RATE_LIMITED: Final = Verdict("rate_limited", "route", 60.0, then="key")
CONCURRENCY: Final = Verdict("concurrency", "route", 3.0, then="key")
DAY_QUOTA: Final = Verdict("day_quota", "route", 86_400.0, then="key", until="day")
PLAN_QUOTA: Final = Verdict("plan_quota", "route", 3600.0, then="key")
NO_TIER: Final = Verdict(
    "no_tier", "route", 86_400.0, then="key", heeds=False,
    advice="this key's plan does not hold the model at all",
)  # fmt: skip
OVERLOADED: Final = Verdict("overloaded", "route", 10.0, counts=True, then="key")
BUSY: Final = Verdict("overloaded", "route", 5.0, then="key")  # told as a limit: never ill health
MODEL_BUSY: Final = Verdict("overloaded", "model", 15.0)
SICK: Final = Verdict("provider_error", "route", 15.0, counts=True, then="key")
BAD_ANSWER: Final = Verdict("bad_answer", "route", 30.0, counts=True)
CLIENT_FAULT: Final = Verdict("client_fault", then="stop")
CONTENT_FILTER: Final = Verdict("content_filter", then="stop")
FILTERED_HERE: Final = Verdict("content_filter")  # where another provider may be asked
MISSPOKEN: Final = Verdict("bad_tool_call")
MODEL_REFUSED: Final = Verdict("model_refused", "model", 3600.0, heeds=False)
MODEL_GONE: Final = Verdict("model_gone", "model", 3600.0, heeds=False)
UNFIT: Final = Verdict("unfit")  # this provider cannot be asked this; nothing was sent
DEAD_KEY: Final = Verdict("dead_key", "key", 3600.0, then="key", heeds=False)
NO_CREDIT: Final = Verdict("no_credit", "key", 3600.0, then="key")
REGION: Final = Verdict(
    "region", "provider", 6 * 3600.0, then="provider", heeds=False,
    advice="the provider does not serve this place or network",
)  # fmt: skip
POLICY: Final = Verdict(
    "policy", "provider", 86_400.0, then="provider", heeds=False,
    advice="the provider serves this plan to other programs only",
)  # fmt: skip

# An error inside a 200 that names no status is looked up under this one.
IN_OK: Final = 299
LIMITED: Final = frozenset((429, IN_OK))
CROWDED: Final = frozenset((429, 500, 502, 503, 504, 529, IN_OK))

RULES: Final = (
    # What no waiting helps.
    Rule(codes(400, 413, 422, 500, IN_OK), OVERFLOW_WORDS, OVERFLOW),
    Rule(codes(413, *LIMITED), TOO_BIG_WORDS, OVERFLOW),
    Rule(codes(400, 403, 422, IN_OK), FILTER_WORDS, CONTENT_FILTER),
    # Limits, from the special to the usual; no_credit is none where a wait is stated, see judge.
    Rule(codes(403, *LIMITED), NO_TIER_WORDS, NO_TIER),
    Rule(codes(402, *LIMITED), MONTH_CREDIT_WORDS,
         Verdict("no_credit", "key", 86_400.0, then="key", until="month")),
    Rule(codes(402), AFFORD_WORDS, Verdict("unaffordable")),
    Rule(codes(400, 401, 403, *LIMITED), CREDIT_WORDS, NO_CREDIT),
    Rule(LIMITED, CONCURRENCY_WORDS, CONCURRENCY),
    Rule(CROWDED, MODEL_BUSY_WORDS, MODEL_BUSY),
    Rule(LIMITED, OVERLOAD_WORDS, BUSY),
    Rule(codes(IN_OK), FULL_WORDS, BUSY),  # nvidia (new-api#6619); in a 429 it is google's quota
    Rule(codes(400, *LIMITED), ACCOUNT_PLAN_WORDS,
         Verdict("plan_quota", "key", 3600.0, then="key")),
    Rule(LIMITED, MINUTE_WORDS, RATE_LIMITED),  # before the day: both may be named
    Rule(LIMITED, ACCOUNT_DAY_WORDS,
         Verdict("day_quota", "key", 86_400.0, then="key", until="day")),
    Rule(LIMITED, GOOGLE_DAY_WORDS,
         Verdict("day_quota", "route", 86_400.0, then="key", until="day", heeds=False)),
    Rule(LIMITED, DAY_WORDS, DAY_QUOTA),
    Rule(LIMITED, PLAN_WORDS, PLAN_QUOTA),
    Rule(codes(429), None, RATE_LIMITED),
    Rule(codes(IN_OK), RATE_WORDS, RATE_LIMITED),
    # The key, the place, the plan.
    Rule(codes(400, 401, 403, IN_OK), DEAD_KEY_WORDS, DEAD_KEY),
    Rule(codes(400, 403, 451), REGION_WORDS, REGION),
    Rule(codes(400), re.compile("not in an active state", re.IGNORECASE), CLIENT_FAULT),  # a file
    Rule(codes(400), re.compile("failed_precondition", re.IGNORECASE), REGION),  # gemini
    Rule(codes(401, 403), POLICY_WORDS, POLICY),
    Rule(codes(403), FORBIDDEN_RATE_WORDS, RATE_LIMITED),
    Rule(codes(403), WALL_WORDS, Verdict("blocked", "provider", 600.0, then="provider")),
    # The provider's health, told as a 400 (9router#2527).
    Rule(codes(400), re.compile("degraded function", re.IGNORECASE), SICK),
    Rule(codes(400, IN_OK), MISSPOKEN_WORDS, MISSPOKEN),
    # The model.
    Rule(codes(400, IN_OK), NO_SUCH_MODEL, MODEL_REFUSED),
    Rule(codes(401, 403), MODEL_WORDS, MODEL_REFUSED),
    Rule(codes(401), None, DEAD_KEY),
    Rule(codes(402), None, NO_CREDIT),
    Rule(codes(403), None, Verdict("forbidden", "route", 600.0, then="key")),
    Rule(codes(404), NO_ENDPOINT_WORDS, UNFIT),
    Rule(codes(404, 410), None, MODEL_GONE),
    Rule(codes(413), None, TOO_LARGE),
    # The rest of the statuses.
    Rule(codes(400, 422), None, CLIENT_FAULT),
    Rule(codes(529), None, OVERLOADED),
    Rule(CROWDED, OVERLOAD_WORDS, OVERLOADED),
    Rule(codes(408, 409, 425, *range(500, 600)), None, SICK),
    Rule(codes(IN_OK), None, BAD_ANSWER),
    Rule(range(300, 500), None, Verdict("unexpected_status", "route", 60.0, True, "provider")),
)  # fmt: skip
# Outcomes without a usable status. A silent or unreachable provider is not asked again with
# its other keys: they lead to the same silence.
SORTS: Final = {
    "network": Verdict("unreachable", "model", 15.0, counts=True),
    "timeout": Verdict("timeout", "model", 30.0, counts=True),
    "reset": Verdict("reset", "route", 15.0, counts=True, then="key"),
    "empty": Verdict("empty_answer", "route", 30.0, counts=True),
    "garbled": BAD_ANSWER,
    "strange": Verdict("not_the_same_answer"),
}
# Limits that end by themselves; when nothing else failed a request, the client is told a 429.
LIMITS: Final = frozenset({"rate_limited", "concurrency", "day_quota", "plan_quota"})
# What a client's request may be to blame for; the most telling first.
CLIENT_SIDE: Final = (
    "content_filter", "client_fault", "context_overflow", "too_large", "unfit", "model_refused",
)  # fmt: skip
CLIENT_CODES: Final[Mapping[str, str]] = {"content_filter": "content_filter"}
# What stands in quotes may be the client's: whoever asks for the tool "invalid api key" must not
# put a key to rest.
QUOTED: Final = re.compile(r"(?<!\w)'[^']*'(?!\w)|\"[^\"]*\"|`[^`]*`")


def judge(outcome: Outcome, in_ok: bool = False) -> Verdict:
    """The verdict on a failed outcome; `in_ok` = it came inside a 200."""
    if outcome.sort:
        return SORTS[outcome.sort]
    status = IN_OK if in_ok and outcome.status == 502 else outcome.status
    said = f"{outcome.text[:600]} {outcome.code}"
    own = f"{QUOTED.sub('``', outcome.text[:600])} {outcome.code}" if status in (400, 422) else said
    if status in LIMITED and never_fits(said):
        return OVERFLOW
    for rule in RULES:
        text = own if rule.verdict.rests else said
        if status in rule.statuses and (not rule.words or rule.words.search(text)):
            # "Insufficient quota" that comes back in a minute is a rate limit.
            soon = rule.verdict is NO_CREDIT and status == 429 and outcome.retry_after
            return RATE_LIMITED if soon else rule.verdict
    return BAD_ANSWER


def client_side(verdict: Verdict, outcome: Outcome) -> bool:
    """Whether the request itself may be to blame; a refused model only if told as a 400."""
    told = verdict.name != MODEL_REFUSED.name or outcome.status in (400, 422)
    return told and verdict.name in CLIENT_SIDE


def never_fits(text: str) -> bool:
    """Whether one request asks for more tokens than a whole minute or day allows."""
    sizes = SIZES.search(text)
    return sizes is not None and int(sizes[2]) > int(sizes[1])


# --- for how long ---


def rest_seconds(verdict: Verdict, outcome: Outcome, clock: Clock, wall: float) -> float:
    """Seconds that the verdict's key, model or provider rests from `wall` (unix seconds)."""
    if verdict.heeds:
        if outcome.retry_after is not None:
            return max(outcome.retry_after, 1.0)
        if (stated := Wait(at=outcome.resets_at).seconds(wall)) is not None:
            return stated
    if verdict.until == "day":
        return until_midnight(clock, wall)
    if verdict.until == "month":
        return until_next_month(wall)
    return verdict.rest_s


def until_midnight(clock: Clock, wall: float) -> float:
    """Seconds until the provider's next day begins."""
    ahead = zone_seconds(clock, wall)
    left = 86_400 - (wall + ahead) % 86_400
    return max(1.0, left + ahead - zone_seconds(clock, wall + left))


def until_next_month(wall: float) -> float:
    """Seconds until the first of the next month, UTC."""
    now = datetime.fromtimestamp(wall, timezone.utc)
    year, month = now.year + now.month // 12, now.month % 12 + 1
    return max(1.0, datetime(year, month, 1, tzinfo=timezone.utc).timestamp() - wall)


def zone_seconds(clock: Clock, wall: float) -> float:
    """How far a provider's clock is ahead of UTC. The USA's summer time as of 2007's law."""
    if clock != "pacific":
        return 28_800.0 if clock == "beijing" else 0.0
    year = datetime.fromtimestamp(wall, timezone.utc).year
    begins = datetime(year, 3, 8, 10, tzinfo=timezone.utc)  # the second Sunday, at 2:00
    ends = datetime(year, 11, 1, 9, tzinfo=timezone.utc)  # the first Sunday, at 2:00
    summer = next_sunday(begins) <= wall < next_sunday(ends)
    return -25_200.0 if summer else -28_800.0


def next_sunday(date: datetime) -> float:
    """Unix seconds of `date` or of the Sunday after it."""
    return date.timestamp() + (6 - date.weekday()) * 86_400


# =============================================================================
# 30. Transport
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

    __slots__ = (
        "_beat", "_lock", "_sock", "cut", "deadline", "gone", "hang_up", "last", "quiet_since",
        "waiting",
    )  # fmt: skip

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self.deadline = math.inf  # monotonic seconds
        self.last = math.inf  # of the whole request
        self.gone = False
        self.cut = False
        self.waiting = True  # for the provider; False while the client takes what came
        self.quiet_since = math.inf  # monotonic seconds; since then the client heard nothing
        self._beat: Callable[[], None] | None = None
        self.hang_up: Callable[[], None] = self.cut_off  # on a client that does not read

    def hold(self, sock: socket.socket) -> None:
        """From now on `sock` is what gets cut. ClientGone if it is too late already."""
        with self._lock:
            self._sock = sock
        if self.gone:
            raise ClientGone
        if self.cut:
            raise TimeoutError

    def begin(self, deadline: float, last: float) -> None:
        """A new attempt, to be cut at `deadline`; the whole request ends at `last`."""
        with self._lock:
            self.cut = False
        self.deadline, self.last, self.waiting = deadline, last, True
        self.quiet_since = math.inf  # no sign of life until something has come

    def wait(self, now: float, deadline: float) -> None:
        """From now on a stream's provider is waited for."""
        self.deadline, self.quiet_since, self.waiting = deadline, now, True

    def resume(self, deadline: float) -> None:
        """Something came. Waits until a sign of life under way has been sent."""
        self.deadline = deadline
        with self._lock:
            self.waiting = False

    def show_life(self, beat: Callable[[], None] | None) -> None:
        """What tells a waiting client that the stream is alive; None = no more of that."""
        with self._lock:
            self._beat = beat

    def pulse(self, now: float) -> None:
        """A sign of life, from the watchdog's thread."""
        with self._lock:
            if self._beat and self.waiting and not self.cut:
                self.quiet_since = now
                self._beat()

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
    BEAT_S: ClassVar[float] = 15.0  # clients and front ends give up after 30 s and more

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
                if guard.deadline <= now or guard.quiet_since + self.BEAT_S <= now:
                    self._look_after(guard, now)
            if not self._live:
                self._some.clear()
                if self._live:  # somebody came between the look and the clearing
                    self._some.set()

    @staticmethod
    def _look_after(guard: Guard, now: float) -> None:
        try:
            if guard.deadline <= now:
                guard.expire()
            else:
                guard.pulse(now)
        except Exception:  # one that fails must not stop the watch over all others
            log.exception("a request could not be cut off or kept alive")


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
        length = b"Content-Length: %d\r\n" % len(body)
        return self._ask(origin, b"POST", path, headers + length, body, guard)

    def get(self, origin: Origin, path: str, headers: bytes, guard: Guard) -> Response:
        """One GET, in all else like `post`."""
        return self._ask(origin, b"GET", path, headers, b"", guard)

    def _ask(
        self, origin: Origin, method: bytes, path: str, headers: bytes, body: bytes, guard: Guard
    ) -> Response:
        link = self._kept(origin)
        reused = link is not None
        while True:
            link = link or self._open(origin, guard)
            try:
                return self._exchange(link, self._head(origin, method, path, headers), body, guard)
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

    def post_json(self, url: str, body: Json, timeout: float) -> tuple[int, Any]:
        """One small POST beside the requests of clients: (status, the JSON answered or None)."""
        answer = self._session.post(url, json=body, timeout=timeout, allow_redirects=False)
        return answer.status_code, read_json(answer.content[:READ_BYTES])

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

    def _head(self, origin: Origin, method: bytes, path: str, headers: bytes) -> bytes:
        pool = self._pools.get(origin.url)
        # A plain-HTTP proxy wants the whole URL in the request line.
        prefix = ""
        if pool and pool.proxy and not origin.tls:
            prefix = f"http://{origin.host}"
            lines = (f"{name}: {value}\r\n" for name, value in pool.proxy_headers.items())
            headers += "".join(lines).encode("latin-1")
        return b"%b %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (
            method,
            f"{prefix}{origin.path}{path}".encode(),
            origin.host.encode(),
            headers,
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
# 31. Upstream
# =============================================================================

MAX_HELD_BYTES: Final = 1 << 20  # of a stream before its first useful event
LINGER_S: Final = 0.3  # for the end of the coding after [DONE]
NOT_EVENTS: Final = (b"{", b"<", b"[")  # how JSON and HTML begin, and no event
MAX_REMEDIES: Final = 3  # in one attempt: most providers name one thing at a time
OVERFLOWS: Final = frozenset({OVERFLOW.name, TOO_LARGE.name})


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
    rest_s: float = 0.0  # how long what the verdict blames rests
    final: Json | None = None  # the client's answer, parsed
    left_out: Sequence[str] = ()  # tools that were not sent on
    refusal: bytes = b""  # the body of an error status
    sizes: Sizes = Sizes()  # what an overflow states, or what is known of the window


class Patience:
    """How long the next piece of a stream is waited for; pings of the provider do not count."""

    def __init__(
        self, guard: Guard, idle_s: float, deadline: float, now: Callable[[], float]
    ) -> None:
        self._guard, self._idle_s, self._deadline, self._now = guard, idle_s, deadline, now
        self._since = now()

    def wait(self, stirred: bool) -> None:
        now = self._now()
        if stirred:
            self._since = now
        self._guard.wait(now, min(self._since + self._idle_s, self._deadline))

    def resume(self) -> None:
        self._guard.resume(self._deadline)

    def linger(self) -> None:
        """After the end: only a moment for what is left of the coding."""
        now = self._now()
        self._guard.wait(now, min(now + LINGER_S, self._deadline))


class Relay:
    """A committed stream: an iterator of byte blocks that always gets closed."""

    def __init__(self, response: Response | None, flow: Flow, cutter: EventCutter) -> None:
        self._response, self.flow, self._cutter = response, flow, cutter
        self.patience: Patience | None = None  # limits the next wait
        self.held = b""  # what commits the stream
        self.read_out = False  # the client got all of it
        self.broken = False  # the client was told that it broke off
        self.rescue: Callable[[Relay], Relay | None] | None = None  # somebody who goes on
        self.on_close: Callable[[Relay], None] | None = None
        self.keep: Callable[[Json], None] | None = None  # gets the whole answer at the end

    @property
    def tokens(self) -> Tokens | None:
        return self.flow.tokens

    @property
    def failure(self) -> Outcome | None:
        return self.flow.failure

    def __iter__(self) -> Relay:
        return self

    def __next__(self) -> bytes:
        try:
            while not self.broken:
                if block := self._next():
                    return block
                if self._response is None and not self.flow.failure:
                    break
        except ClientGone:
            self._response = None
            self.close()
            raise StopIteration from None
        self.read_out = True
        if self.keep and self.flow.final:
            self.keep(self.flow.final)
        self.close()
        raise StopIteration

    def _next(self) -> bytes:
        """The next bytes for the client, b"" when only part of an event has come."""
        if self.held:
            block, self.held = self.held, b""
            return block
        if self.flow.failure:
            return self._mend()
        return self._more(self._response) if self._response is not None else b""

    def _more(self, response: Response) -> bytes:
        flow = self.flow
        if flow.done:
            self._drain(response)
            return b""
        try:
            data = self._read(response)
            if data:
                return flow.take(self._cutter.feed(data))
        except (TransportError, ValueError) as error:
            return self._break_off(response, error)
        self._response = None
        return flow.end(self._cutter.rest)

    def _read(self, response: Response) -> bytes:
        """What came; only the provider's silence counts against it, not a slow client's."""
        if self.patience is None:
            return response.read1()
        self.patience.wait(self.flow.stirred)
        self.flow.stirred = False
        data = response.read1()
        self.patience.resume()
        return data

    def _break_off(self, response: Response, error: TransportError | ValueError) -> bytes:
        """The connection failed; an answer that was whole by then is whole."""
        self._response = None
        response.close()
        if self.flow.finished:
            return self.flow.end(b"")
        sort = error.sort if isinstance(error, TransportError) else "garbled"
        self.flow.failure = Outcome(0, str(error), sort)
        return b""

    def _mend(self) -> bytes:
        """Somebody goes on with what broke off; else the client learns that it did."""
        if self._response is not None:
            self._response.close()
            self._response = None
        rescue, self.rescue = self.rescue, None
        other = rescue(self) if rescue else None
        if other is None:
            self.broken = True
            problem = self.flow.failure or BROKEN
            text = f"the provider failed in the middle of its answer: {problem.text}"
            return self.flow.fail(Exhausted(text, code="stream_interrupted"))
        self._response, self.flow, self._cutter = other._response, other.flow, other._cutter
        self.patience, self.on_close = other.patience, other.on_close
        return other.held

    def _drain(self, response: Response) -> None:
        """After the end: read what is left of the coding so that the connection can be kept."""
        self._response = None
        if self.patience:
            self.patience.linger()
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


def refusal_wait(provider: Provider, response: Response, body: bytes, wall: float) -> float | None:
    """How long a refusal lasts as it states itself, in seconds from `wall`; None if it does not."""
    if not provider.accounts:
        return stated_wait(response.headers, body, wall, zone_seconds(provider.clock, wall))
    limited = response.status in (429, 503, 529)
    return codex_wait(response.headers, body, wall) if limited else None


class Upstream:
    """Sends one request to one target and judges what comes back."""

    def __init__(
        self,
        config: Config,
        transport: Transport,
        now: Callable[[], float],
        accounts: Accounts,
        lessons: Lessons | None = None,
    ) -> None:
        self._config, self._transport, self._now = config, transport, now
        self._accounts, self.lessons = accounts, lessons or Lessons(now)
        self._heads: dict[tuple[str, str, str], bytes] = {}
        self._lacking: set[tuple[str, str]] = set()  # (service, dialect) that it does not speak

    def send(
        self, target: Target, lease: Lease, ask: Ask, deadline: float, last: bool = True
    ) -> Attempt:
        """One attempt; `deadline` is the monotonic time when the whole request ends.

        `last`: nobody else can be asked, so a slow provider gets all the time there is.
        """
        started = self._now()
        patience = self._config.ttft_timeout * (1 if ask.stream else 3)
        if ask.stream and not last and target.service.provider.tier != "local":
            switch = self._config.ttft_switch
            patience = min(patience, switch + ask.tokens / 4000 if switch else patience)
        ask.guard.begin(min(started + patience, deadline), deadline)
        try:
            attempt = self._healed(target, lease, ask, self._try(target, lease, ask))
        except (TransportError, AccountError) as error:
            attempt = failed(Outcome(0, error.text, error.sort))
        except BadRequest as error:  # this dialect has no words for it
            attempt = Attempt(UNFIT, Outcome(400, error.message))
        ask.guard.deadline = deadline
        attempt.seconds = self._now() - started
        if attempt.stream:
            idle_s = self._config.stream_idle_timeout
            attempt.stream.patience = Patience(ask.guard, idle_s, deadline, self._now)
        return attempt

    def _keep_waiting(self, guard: Guard) -> Callable[[], None]:
        """What has come is held back: from here silence counts, not the time it takes."""
        last = guard.last

        def extend() -> None:
            guard.deadline = min(self._now() + self._config.stream_idle_timeout, last)

        return extend

    def _try(self, target: Target, lease: Lease, ask: Ask) -> Attempt:
        dialects = self._spoken(target, ask)
        secret = self._secret(target, lease)
        response = self._post(target, lease, secret, ask, dialects[0])
        if response.status == 401 and target.service.provider.accounts:
            # The token may have been revoked before its time: a new one is tried once.
            self._accounts.reject(lease.key, secret)
            response.close()
            secret = self._secret(target, lease)
            response = self._post(target, lease, secret, ask, dialects[0])
        elif response.status in (404, 405, 501) and len(dialects) > 1:
            response.close()  # a server under a provider's name may speak Chat only
            response = self._post(target, lease, secret, ask, dialects[1])
            if response.status == 200:
                self._lacking.add((target.provider, dialects[0].name))
            dialects = dialects[1:]
        if response.status != 200:
            return self._refused(response, secret.encode(), target.service.provider)
        passage = Passage(dialects[0], ask, target.provider, secret.encode())
        if ask.stream:
            attempt = first_useful(response, passage, self._keep_waiting(ask.guard))
        else:
            attempt = whole_answer(response, passage)
        attempt.left_out = () if passage.native else ask.left_out
        return attempt

    def _healed(self, target: Target, lease: Lease, ask: Ask, attempt: Attempt) -> Attempt:
        """The attempt; made again with the same key where the refusal says what to change.

        What helped is remembered. A refusal that names something else may follow, so often.
        """
        self._measure(target, attempt)
        for _ in range(MAX_REMEDIES):
            if not self._remedied(target, ask, attempt):
                break
            attempt = self._try(target, lease, ask)
            self._measure(target, attempt)
        place = ask.kept_body[0]
        if attempt.verdict is None and place in ask.mends:
            self.lessons.learn(target.provider, target.model, place[1], ask.mends[place])
        return attempt

    def _remedied(self, target: Target, ask: Ask, attempt: Attempt) -> bool:
        """Whether the body was changed in a way that may help."""
        place, sent = ask.kept_body
        if attempt.verdict is None or place[0] != target.label:
            return False
        done = ask.mends.get(place, ())
        mends = remedy(attempt.outcome, attempt.refusal, sent, place[1], done)
        if mends:
            told = "; ".join(map(str, mends))
            log.info("%s refused the request, tried again: %s", target.label, told)
            ask.mends[place], ask.kept_body = (*done, *mends), (NOBODY, b"")
        return bool(mends)

    def _measure(self, target: Target, attempt: Attempt) -> None:
        """Note the sizes that an overflow states, and remember the window."""
        if attempt.verdict is None or attempt.verdict.name not in OVERFLOWS:
            return
        text = words_of(attempt.outcome, attempt.refusal, read_json(attempt.refusal))
        sizes = stated_sizes(text)
        self.lessons.learn_window(target.provider, target.model, sizes.most)
        most = sizes.most or listed_window(target)
        attempt.sizes = sizes._replace(most=most)

    def _secret(self, target: Target, lease: Lease) -> str:
        """What authorises the request: the key, or an account's token, renewed if need be."""
        if target.service.provider.accounts:
            return self._accounts.access_token(lease.key)
        return lease.key

    def _spoken(self, target: Target, ask: Ask) -> list[Dialect]:
        """The dialects to try, the client's own first."""
        wanted = ask.surface.dialect
        if wanted == "embeddings":
            return [DIALECTS[wanted]]
        names = [n for n in target.dialects if (target.provider, n) not in self._lacking]
        names.sort(key=lambda name: name != wanted)
        return [DIALECTS[name] for name in names or target.dialects]

    def _post(
        self, target: Target, lease: Lease, secret: str, ask: Ask, dialect: Dialect
    ) -> Response:
        service, native = target.service, dialect.name == ask.surface.dialect
        if service.provider.accounts:
            headers = header_lines(self._account_headers(service, lease.key, secret))
        else:
            headers = self._headers(service, secret, dialect.name)
        if native:
            headers += ask.forward
        elif dialect.name == "messages":
            headers += CLAUDE_VERSION
        return self._transport.post(
            self._transport.origin(service.url),
            dialect.path,
            headers,
            self._body(target, ask, dialect.name, native),
            ask.guard,
        )

    def look_up(self, service: Service, key: str, path: str, guard: Guard) -> Outcome:
        """What a GET with a key says: its status, and of a failure the reason."""
        secret = self._accounts.access_token(key) if service.provider.accounts else key
        dialect = service.provider.dialects[0]
        if service.provider.accounts:
            headers = header_lines(self._account_headers(service, key, secret))
        else:
            headers = self._headers(service, secret, dialect)
        if dialect == "messages":
            headers += CLAUDE_VERSION
        origin = self._transport.origin(service.url)
        response = self._transport.get(origin, path, headers, guard)
        if response.status == 200:  # a list of models may be large
            response.close()
            return Outcome(200, "")
        if response.status == 401 and service.provider.accounts:
            self._accounts.reject(key, secret)  # the next time with a new one
        return self._refused(response, secret.encode(), service.provider).outcome

    def _refused(self, response: Response, secret: bytes, provider: Provider) -> Attempt:
        """A status other than 200, with the provider's reason."""
        try:
            body = masked(response.read(limit=1 << 20), secret)
        except TransportError as error:
            body = error.text.encode()
        wait = refusal_wait(provider, response, body, time.time())
        outcome = Outcome(
            response.status, error_text(body), retry_after=wait, code=error_code(body)
        )
        attempt = failed(outcome)
        attempt.refusal = body
        return attempt

    def _headers(self, service: Service, key: str, dialect: str) -> bytes:
        """Header lines for one (service, key), made once where they do not change."""
        made = self._heads.get((service.name, key, dialect))
        if made is None:
            lines = {**COMMON_HEADERS, **dict(service.headers)}
            if key and dialect == "messages":
                lines["x-api-key"] = key
            elif key:
                lines["Authorization"] = f"Bearer {key}"
            made = self._heads[service.name, key, dialect] = header_lines(lines)
        return made

    @staticmethod
    def _account_headers(service: Service, account: str, token: str) -> dict[str, str]:
        """Headers of a subscription, whose token changes every hour."""
        return {
            **COMMON_HEADERS,
            **dict(service.headers),
            **codex_headers(account),
            "Authorization": f"Bearer {token}",
        }

    def _body(self, target: Target, ask: Ask, dialect: str, native: bool) -> bytes:
        """The client's bytes with the edits this target needs, or its chat in another dialect."""
        place = (target.label, dialect)
        if ask.kept_body[0] == place:  # the same for every key
            return ask.kept_body[1]
        if dialect == "embeddings":
            made = edit_body(ask.raw, ask.body, model_edit(target, ask))
        else:
            made = BODIES[dialect](target, ask, native, self._config.reasoning_reserve)
        learnt = self.lessons.mends(target.provider, target.model, dialect)
        made = mended(made, (*learnt, *ask.mends.get(place, ())))
        ask.kept_body = (place, made)
        return made


COMMON_HEADERS: Final = {
    "Content-Type": "application/json",
    "Accept": "application/json, text/event-stream",
    "Accept-Encoding": "identity",
    "User-Agent": f"hermes-router/{__version__}",
}
CLAUDE_VERSION: Final = b"anthropic-version: 2023-06-01\r\n"


def header_lines(headers: Mapping[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")


def model_edit(target: Target, ask: Ask) -> dict[str, object]:
    return {} if ask.body.get("model") == target.model else {"model": target.model}


def chat_body(target: Target, ask: Ask, native: bool, reserve: int) -> bytes:
    """A chat body that this provider takes; the client's own bytes where little must change."""
    if why := target.fit.refuses(ask.chat):
        raise BadRequest(why)
    edits = {**model_edit(target, ask), **target.fit.edits(ask.chat)}
    asked = {**ask.chat, **edits} if edits else ask.chat
    edits |= output_edits(asked, reserve * target.reasoning, target.service.max_output_tokens)
    if edits.get("stream", ask.stream) and target.service.provider.stream_options:
        if not (native and ask.wants_usage):
            options = ask.chat.get("stream_options") or {}
            edits["stream_options"] = {**options, "include_usage": True}
    elif "stream_options" in ask.chat:
        edits["stream_options"] = DROP
    if native:
        return edit_body(ask.raw, ask.body, edits) if edits else ask.raw
    whole = {**ask.chat, "stream": ask.stream, **edits}
    return dump_json({name: value for name, value in whole.items() if value is not DROP})


def messages_body(target: Target, ask: Ask, native: bool, _reserve: int) -> bytes:
    if native:
        edits = native_edits(target, ask) | (own_thinking(ask.body, target.provider) or {})
        return edit_body(ask.raw, ask.body, edits)
    made = chat_to_messages(ask.chat, target.model, target.claude, target.provider)
    return dump_json({**made, "stream": ask.stream})


def codex_body(target: Target, ask: Ask, _native: bool, _reserve: int) -> bytes:
    return dump_json(chat_to_responses(ask.chat, target.model, target.provider, codex=True))


def responses_body(target: Target, ask: Ask, native: bool, reserve: int) -> bytes:
    if not native:
        ceiling = target.service.max_output_tokens
        chat = {**ask.chat, **output_edits(ask.chat, reserve * target.reasoning, ceiling)}
        reasons = target.facts.reasoning is not False
        made = chat_to_responses(chat, target.model, target.provider, reasons=reasons)
        return dump_json({**made, "stream": ask.stream})
    edits, body = native_edits(target, ask), ask.body
    if ask.input is not None:
        body = {**body, "input": ask.input}
        edits |= {"input": ask.input, "previous_response_id": DROP}
    return edit_body(ask.raw, ask.body, edits | (own_reasoning(body, target.provider) or {}))


def native_edits(target: Target, ask: Ask) -> dict[str, object]:
    """The model, and the output limit where it is above the ceiling; no reserve is added."""
    ceiling = target.service.max_output_tokens
    return model_edit(target, ask) | output_edits(ask.body, 0, ceiling)


BODIES: Final[Mapping[str, Callable[[Target, Ask, bool, int], bytes]]] = {
    "chat": chat_body,
    "messages": messages_body,
    "responses": responses_body,
    "codex": codex_body,
}


def failed(outcome: Outcome, in_ok: bool = False) -> Attempt:
    return Attempt(judge(outcome, in_ok), outcome)


def whole_answer(response: Response, passage: Passage) -> Attempt:
    """A 200 read to its end and judged; its bytes are kept as they came where they may be."""
    body = response.read()
    whole = passage.whole(body)
    if whole.problem:
        return failed(whole.problem, in_ok=True)
    content_type = response.headers.get("content-type", "")
    if whole.body is not body or "json" not in content_type:
        content_type = "application/json"  # deepseek sends octet-stream, others text/plain
    made = Attempt(None, Outcome(200, ""), whole.body, content_type, whole.tokens)
    made.final = whole.final
    return made


def first_useful(response: Response, passage: Passage, extend: Callable[[], None]) -> Attempt:
    """Hold a stream back until its first useful event has come: only then is it committed.

    `extend` moves the deadline while what came has to be held back longer.
    """
    flow, cutter, size, begun = passage.flow(), EventCutter(), 0, False
    held: list[bytes] = []
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
        if flow.odd:
            flow, anew = flow.translated()
            held = [anew]
        if flow.useful:
            return committed(response if data else None, flow, cutter, b"".join(held))
        if not data:
            text = "the stream ended before its first useful event" if begun else "an empty stream"
            flow.failure = flow.failure if flow.alive else Outcome(0, text, "empty")
        if flow.alive:
            extend()
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
# 32. Checks
# =============================================================================

Standing = Literal["valid", "dead", "unclear"]

# Keys may be made for answers only: what they may not list they may still be asked.
SCOPE_WORDS: Final = re.compile(r"\bscopes?\b|permission", re.IGNORECASE)


def standing(outcome: Outcome) -> Standing:
    """What one answer tells about a key. Only what comes after the key was looked at counts.

    A 429 may come before that: Venice answers so after many invalid keys (2026-09).
    """
    if outcome.status == 200 or outcome.sort == "empty":
        return "valid"
    verdict = judge(outcome).name
    if verdict in DEAD:
        return "dead"
    return "valid" if verdict == NO_CREDIT.name else "unclear"


def jitter() -> float:
    """A factor from 0.9 to 1.1, so that many routers do not ask at the same moment."""
    return 0.9 + secrets.randbelow(2001) / 10_000


class KeyProbe:
    """Asks a provider whether a key is valid: by its cheapest GET, else by a chat of one token.

    Nothing of it counts as a request: no usage, no breaker, no rest. One at a time.
    """

    LIMIT_S: ClassVar[float] = 15.0

    def __init__(
        self,
        upstream: Upstream,
        directory: Directory,
        watchdog: Watchdog,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._upstream, self._directory, self._watchdog = upstream, directory, watchdog
        self._now, self._guard = now, Guard()

    def ask(self, provider: str, key: str, by_chat: bool = False) -> Standing:
        service = self._directory.services.get(provider)
        if service is None:
            return "unclear"
        deadline = self._now() + self.LIMIT_S
        self._guard.begin(deadline, deadline)
        self._watchdog.watch(self._guard)
        try:
            path = "" if by_chat else service.provider.key_check
            outcome = self._upstream.look_up(service, key, path, self._guard) if path else None
            if outcome is None or self._not_told(outcome):
                outcome = self._chat(service, key)
            return standing(outcome) if outcome else "unclear"
        except (TransportError, AccountError, ClientGone):
            return "unclear"
        finally:
            self._watchdog.unwatch(self._guard)

    def close(self) -> None:
        """Cut off the probe under way; no other one succeeds."""
        self._guard.client_gone()

    @staticmethod
    def _not_told(outcome: Outcome) -> bool:
        """There is no such list, or this key may not see it."""
        return outcome.status in (403, 404, 405, 501) or (
            outcome.status == 401 and SCOPE_WORDS.search(outcome.text) is not None
        )

    def _chat(self, service: Service, key: str) -> Outcome | None:
        """One token from the provider's cheapest model; None without a model."""
        targets = [t for t in self._directory.targets if t.provider == service.name]
        if not targets:
            return None
        # Not as a reasoning model: those get thousands of tokens more to think with.
        target = replace(min(targets, key=lambda t: t.cost), reasoning=False)
        messages = [{"role": "user", "content": "hi"}]
        body: Json = {"model": target.model, "messages": messages, "max_tokens": 1}
        ask = Ask(CHAT, dump_json(body), body, body, self._guard, started=self._now())
        lease = Lease(service.name, key, target.model)
        return self._upstream.send(target, lease, ask, self._now() + self.LIMIT_S).outcome


@dataclass
class Case:
    """A dead key: when it is asked again, and how."""

    wait_s: float = 0.0  # before the next question; doubles
    due: float = math.inf  # inf = the key is not dead now
    dead_at: float = -math.inf  # when it was last seen so
    by_chat: bool = False  # the GET called it valid once and was wrong


class KeyChecks:
    """Dead keys are asked again, ever more rarely, and are free as soon as they are valid.

    One thread, one question at a time, and none while no key is dead. `ask` is given
    (provider, key, by_chat); `now` is the pool's clock.
    """

    FIRST_S: ClassVar[float] = 900.0
    LONGEST_S: ClassVar[float] = 6 * 3600.0
    SPARE_S: ClassVar[float] = 300.0  # a quarantine outlasts the next question by so much

    def __init__(
        self,
        keys: KeyPool,
        ask: Callable[[str, str, bool], Standing],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys, self._ask, self._now = keys, ask, now
        self._cases: dict[tuple[str, str], Case] = {}
        self._bell, self._lock = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._on = self._closed = False

    def start(self) -> None:
        self._on = True
        if self._keys.dead():
            self.wake()

    def wake(self) -> None:
        """A key has just been found dead."""
        if not self._on:
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="key-checks", daemon=True)
                self._thread.start()
        self._bell.set()

    def close(self) -> None:
        self._on, self._closed = False, True
        self._bell.set()
        if self._thread is not None:
            self._thread.join(5)

    def _run(self) -> None:
        while not self._closed:
            self._bell.clear()
            try:
                wait = self.run_due()
            except Exception:  # one question that fails must not end all others
                log.exception("a dead key could not be checked")
                wait = self.FIRST_S
            self._bell.wait(wait)

    def run_due(self) -> float | None:
        """Ask what is due now; seconds until the next question, None while no key is dead."""
        self._take_stock()
        now = self._now()
        due = [place for place, case in self._cases.items() if case.due <= now]
        for place in due:
            if not self._closed:
                self._check(*place)
        self._take_stock()
        next_due = min((case.due for case in self._cases.values()), default=math.inf)
        return max(0.0, next_due - self._now()) if next_due < math.inf else None

    def _take_stock(self) -> None:
        """Which keys are dead now. One that died again soon goes on where it had stopped."""
        now, dead = self._now(), set(self._keys.dead())
        for place, case in list(self._cases.items()):
            if place not in dead:
                case.due = math.inf
                if now - case.dead_at > self.LONGEST_S:
                    del self._cases[place]
        for place in dead:
            case = self._cases.setdefault(place, Case())
            case.dead_at = now
            if case.due == math.inf:
                self._put_off(case, 2)

    def _put_off(self, case: Case, factor: int) -> None:
        case.wait_s = min(max(case.wait_s * factor, self.FIRST_S), self.LONGEST_S)
        case.due = self._now() + case.wait_s * jitter()

    def _check(self, provider: str, key: str) -> None:
        case = self._cases[provider, key]
        found = self._ask(provider, key, case.by_chat)
        log.info("key check: %s key=%s is %s", provider, key_tail(key), found)
        if found == "valid":
            self._keys.revive(provider, key)
            # If requests say otherwise, the list is open to anybody.
            case.due, case.by_chat = math.inf, True
        elif found == "dead":
            self._put_off(case, 2)
            seconds = case.due - self._now() + self.SPARE_S
            self._keys.rest(provider, key, ANY, seconds, DEAD_KEY.name)
        else:  # told nothing: the quarantine ends by itself, and a request finds out
            self._put_off(case, 1)


# =============================================================================
# 33. Router
# =============================================================================

MAX_ATTEMPTS: Final = 32
CUT_TOKENS: Final = 2000  # an estimate may be that wrong
QUICK_PAUSE_S: Final = 0.1
MAX_PAUSE_S: Final = 5.0  # a longer wait, or a failure that took longer, is no quick retry
TRANSIENT: Final = (SICK, OVERLOADED, SORTS["reset"])


class Queue:
    """Candidates in their order; tells whether there is another one without taking it.

    Those whose breaker is open come last and are nobody to count on.
    """

    def __init__(self, candidates: Iterable[Candidate], is_open: Callable[[str], bool]) -> None:
        self._rest, self._is_open = iter(candidates), is_open
        self._next: Candidate | None = None

    def __iter__(self) -> Iterator[Candidate]:
        return self

    def __next__(self) -> Candidate:
        found, self._next = self._next, None
        return found or next(self._rest)

    @property
    def empty(self) -> bool:
        self._next = self._next or next(self._rest, None)
        return self._next is None or self._is_open(self._next.target.provider)


@dataclass
class Answer:
    """What goes back to the client, with what the headers and the log say about it."""

    body: bytes | Relay
    content_type: str
    provider: str
    model: str
    attempts: int
    left_out: Sequence[str] = ()  # tools that were not sent on
    final: Json | None = None  # the client's answer, parsed; of a stream when it has ended


@dataclass
class Walk:
    """One request's way through its candidates: what was tried and what is ruled out."""

    tried: list[tuple[str, Attempt]] = field(default_factory=list)  # (label, attempt)
    keys: dict[str, set[str]] = field(default_factory=dict)  # label -> keys tried
    out: set[str] = field(default_factory=set)  # provider names and labels ruled out
    waits: list[float] = field(default_factory=list)  # seconds until a skipped one is ready
    skipped: list[str] = field(default_factory=list)
    whys: list[tuple[str, str]] = field(default_factory=list)  # (provider, why) of the skipped
    repeated: bool = False  # a route was tried twice
    window: Callable[[Target], int] = listed_window
    met: list[Target] = field(default_factory=list)  # candidates so far, tried or not

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
        known = target.label in self.out or target.provider in self.out
        return known or 0 < self.window(target) < self.needs

    @property
    def needs(self) -> int:
        """The window this request needs, as overflows so far tell; 0 = any."""
        return max((a.sizes.needs for a in self.overflows()), default=0)

    @property
    def largest(self) -> int:
        """The largest window that is too small; 0 = none is known."""
        known = (self.window(target) for target in self.met)
        return max((window for window in known if window < self.needs), default=0)

    def overflows(self) -> list[Attempt]:
        return [a for _, a in self.tried if a.verdict and a.verdict.name in OVERFLOWS]

    @property
    def candidates(self) -> int:
        """How many (provider, model) were tried, whatever the number of keys."""
        return len({label for label, _ in self.tried})

    @property
    def verdicts(self) -> set[str]:
        return {a.verdict.name for _, a in self.tried if a.verdict}

    @property
    def limited(self) -> bool:
        """Whether nobody answered because of limits alone, one of which ends by itself."""
        tried = [(a.verdict.name, a.outcome.status) for _, a in self.tried if a.verdict]
        names = self.verdicts | {why for _, why in self.whys}
        passing = all(name in LIMITS or status == 429 for name, status in tried)
        kept = {*LIMITS, NO_CREDIT.name, NO_TIER.name}
        return passing and all(why in kept for _, why in self.whys) and names != {NO_TIER.name}

    def told(self) -> list[str]:
        """Redacted lines about what happened, for the error and the log."""
        return [
            f"{label}: {a.verdict.name if a.verdict else 'ok'}"
            f" ({a.outcome.status or a.outcome.sort}) {a.outcome.text[:160]}".rstrip()
            for label, a in self.tried
        ] + [line for line in self.skipped if not line.startswith(self._asked())]

    def _asked(self) -> tuple[str, ...]:
        """How lines about models begin that were skipped at first and asked in the end."""
        return tuple({f"{label}: " for label, _ in self.tried})


def step_of(target: Target, lease: Lease, attempt: Attempt) -> Step:
    verdict, outcome = attempt.verdict, attempt.outcome
    name = verdict.name if verdict else "ok"
    return Step(target.label, lease.tail, name, outcome.status, attempt.seconds, outcome.text[:200])


class Gate:
    """How many requests are in flight; the one too many is told so at once."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self.inside = 0
        self.closed = False  # the router is on its way out

    def enter(self) -> None:
        with self._lock:
            if self.closed:
                raise Busy("this router is shutting down; try again", retry_after=2)
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
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.config, self.now, self.sleep = config, now, sleep
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
        self.traces = Traces(config.request_log_size)
        self.lessons = Lessons(now)
        self.gate = Gate(config.max_streams)
        self.watchdog = Watchdog(now)
        self.encoder = Encoder()
        self.transport = transport or Transport(config.connect_timeout)
        self.accounts = Accounts(
            config.accounts,
            config.home / config.auth_file,
            self.transport.post_json,
            time.time,
            config.codex_token_url,
        )
        self.upstream = Upstream(config, self.transport, now, self.accounts, self.lessons)
        self.probe = KeyProbe(self.upstream, self.directory, self.watchdog, now)
        self.checks = KeyChecks(self.keys, self.probe.ask, now)
        name = config.state_file
        path = config.home / Path(name).expanduser() if name else None
        self.state = StateFile(path, self.keys, self.breakers, now)
        self.responses = ResponseStore(now=now)

    def start(self) -> None:
        """What goes on beside requests: health is kept in a file, dead keys are asked again."""
        self.state.start()
        if self.config.key_recheck:
            self.checks.start()

    def close(self) -> None:
        """Stop what `start` began, and let go of the connections to providers."""
        self.probe.close()
        self.checks.close()
        self.state.close()
        self.transport.close()

    # -- one request -----------------------------------------------------------------------

    def complete(self, ask: Ask, profile: str = "") -> Answer:
        """Answer a chat request, or raise the RouterError that says why not."""
        choice = self.directory.choose(ask.chat.get("model") or "", ask.fallback)
        tokens = ask.tokens = self.size(ask)
        if choice.echo or self.echoes:
            return echo_answer(ask)
        profile = choice.profile or profile
        threshold = self.config.fast_route_threshold
        traits = Traits(
            rate_difficulty(ask.chat).level,
            wants_tools(ask.chat),
            wants_vision(ask.chat),
            profile,
            0 < tokens < threshold,
            ask.caller.scope,
        )
        groups, turn = self.directory.arranged(traits)
        lead = [t for t in choice.lead if ask.caller.may_use(t.provider)]
        if choice.lead and not choice.spill:
            groups = ()
        limits = Limits(tokens, self.breakers.bucket, self.breakers.is_open, self.window)
        ask.named = frozenset(target.label for target in lead)
        trace = ask.trace
        trace.choice, trace.level, trace.tokens = choice.why, traits.level, tokens
        trace.plan = Arrangement(lead, groups, turn, traits)
        return self.answer(ask, plan(lead, groups, limits, turn, choice.why), tokens)

    def embed(self, ask: Ask) -> Answer:
        """Answer an embeddings request inside one family of models, never mixing vectors."""
        family = self.embedders(str(ask.body.get("model") or ""), ask.caller)
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
        walk, attempt = Walk(window=self.window), None
        ask.trace.skipped = walk.skipped
        self.watchdog.watch(ask.guard)
        queue = Queue(candidates, self.breakers.is_open)
        routes = self.routes(queue, walk, deadline, ask.guard)
        try:
            for target, lease in routes:
                attempt = self.attempt(target, lease, ask, deadline, queue.empty)
                if self.once_more(attempt, target, lease, ask, walk, deadline, queue):
                    attempt = self.attempt(target, lease, ask, deadline, queue.empty)
                first = walk.first_failure(target.label, attempt)
                walk.tried.append((target.label, attempt))
                ask.trace.note(step_of(target, lease, attempt))
                if attempt.verdict is None:
                    answer = self.deliver(target, lease, ask, attempt, walk.candidates)
                    if attempt.stream and self.config.rescue:
                        rescue = Rescue(self, ask, walk, routes, (target, lease), deadline)
                        attempt.stream.rescue = rescue.go_on
                    return answer
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

    def once_more(
        self,
        attempt: Attempt,
        target: Target,
        lease: Lease,
        ask: Ask,
        walk: Walk,
        deadline: float,
        queue: Queue,
    ) -> bool:
        """Whether the same route is worth a second try at once; waits as long as that takes.

        Once in a request: after a failure that is often over a moment later, where nobody else is
        left or the client named the model; then also for a limit that ends within seconds.
        """
        named, verdict = target.label in ask.named, attempt.verdict
        if verdict is None or walk.repeated or not (named or queue.empty):
            return False
        pause = QUICK_PAUSE_S if verdict in TRANSIENT else math.inf
        if named and verdict in (RATE_LIMITED, CONCURRENCY):
            pause = attempt.outcome.retry_after or verdict.rest_s
        if pause > MAX_PAUSE_S or attempt.seconds > MAX_PAUSE_S or self.now() + pause > deadline:
            return False
        if self.keys.another(target.provider, target.model, walk.keys[target.label]):
            return False  # its other keys come next
        walk.repeated = True
        ask.trace.note(step_of(target, lease, attempt))
        self.usage.attempt(target.provider, False, attempt.seconds)
        log.info("%s: %s, asked again in %.1f s", target.label, verdict.name, pause)
        until = self.now() + pause
        while (left := until - self.now()) > 0 and not ask.guard.gone:
            self.sleep(min(left, 0.25))
        return True

    def attempt(
        self, target: Target, lease: Lease, ask: Ask, deadline: float, last: bool = True
    ) -> Attempt:
        """One attempt; a probe token is given back whatever happens."""
        try:
            attempt = self.upstream.send(target, lease, ask, deadline, last)
        except BaseException:
            self.breakers.leave(target.provider, ask.guard)
            raise
        if attempt.verdict is CONTENT_FILTER and self.config.content_filter_failover:
            attempt.verdict = FILTERED_HERE
        return attempt

    def window(self, target: Target) -> int:
        """Tokens the target takes in all: as it stated itself, else as listed; 0 = unknown."""
        return self.lessons.window(target.provider, target.model) or listed_window(target)

    def routes(
        self, candidates: Iterable[Candidate], walk: Walk, deadline: float, owner: Guard
    ) -> Iterator[tuple[Target, Lease]]:
        """(target, lease) pairs to try: every ready key of every candidate, each pair once.

        After an overflow those that surely take more come before those of unknown size. When
        none was left, a last round overlooks rests that were only guesses about health; what is
        ready a moment later is waited for.
        """
        unsure = []
        for target, _why in candidates:
            walk.met.append(target)
            if walk.needs and not self.window(target):
                unsure.append(target)
            else:
                yield from self.leases(target, walk, deadline, frozenset(), owner)
        for target in unsure:
            yield from self.leases(target, walk, deadline, frozenset(), owner)
        until = math.inf
        while True:
            for target in walk.met:
                yield from self.leases(target, walk, deadline, GUESSES, owner)
            until = min(until, self.now() + MAX_PAUSE_S, deadline)
            if not self.is_worth_waiting(walk.met, walk, until, owner):
                return

    def is_worth_waiting(
        self, targets: Sequence[Target], walk: Walk, until: float, owner: Guard
    ) -> bool:
        """Whether a key that this request has not tried is ready soon; waits for it."""
        waits = [
            wait
            for t in targets
            if not walk.ruled_out(t)
            and (wait := self.keys.soonest(t.provider, t.model, walk.keys[t.label])) is not None
        ]
        # A breaker's probe may be under way: its end is nothing that could be known.
        pause = max(min(waits, default=math.inf), QUICK_PAUSE_S)
        if self.now() + pause > until:
            return False
        self.sleep(min(pause, 0.25))
        return not owner.gone

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
                if not ignoring:
                    walk.waits.append(self.breakers.wait(provider))
                    walk.skipped.append(f"{target.label}: resting, its breaker is open")
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
            walk.whys.append((target.provider, why))
            walk.skipped.append(f"{target.label}: resting {math.ceil(wait)} s ({why})")

    def learn(
        self, target: Target, lease: Lease, attempt: Attempt, owner: Guard, first: bool = True
    ) -> None:
        """Let rest what the verdict blames, and tell the breaker: of one model once a request."""
        verdict, outcome = attempt.verdict, attempt.outcome
        if verdict is None:
            return
        key = ANY if verdict.rests in ("model", "provider") else lease.key
        model = ANY if verdict.rests in ("key", "provider") else target.model
        if verdict.rests:
            clock = target.service.provider.clock
            attempt.rest_s = rest_seconds(verdict, outcome, clock, time.time())
            self.keys.rest(target.provider, key, model, attempt.rest_s, verdict.name)
        if verdict.name in DEAD:
            self.checks.wake()
        if verdict.counts and first:
            self.breakers.note(target.provider, False, owner)
        self.breakers.leave(target.provider, owner)
        self.usage.attempt(target.provider, False, attempt.seconds)
        log.warning(
            "%s %s key=%s: %s (%s) %s%s",
            "attempt failed:",
            target.label,
            lease.tail,
            verdict.name,
            outcome.status or outcome.sort,
            outcome.text[:200],
            f" [{verdict.advice}]" if verdict.advice else "",
        )

    def deliver(
        self, target: Target, lease: Lease, ask: Ask, attempt: Attempt, attempts: int
    ) -> Answer:
        """A success: health, usage, and for a stream what happens when it ends."""
        self.keys.forgive(lease)
        self.breakers.note(target.provider, True, ask.guard)
        self.usage.attempt(target.provider, True, attempt.seconds)
        trace = ask.trace
        if not trace.provider:  # a rescue adds to an answer that somebody else began
            trace.provider, trace.model = target.provider, target.model
            trace.ttft_s = self.now() - ask.started if attempt.stream else None
        answer = Answer(attempt.body, attempt.content_type, target.provider, target.model, attempts)
        answer.left_out = attempt.left_out
        if attempt.stream is None:
            self.watchdog.unwatch(ask.guard)
            self.charge(target, attempt.tokens, ask)
            answer.final = attempt.final
            return answer
        answer.body = attempt.stream
        attempt.stream.on_close = functools.partial(self.stream_ended, target, lease, ask)
        return answer

    def stream_ended(self, target: Target, lease: Lease, ask: Ask, relay: Relay) -> None:
        """After the last byte, or after the client left."""
        self.leave(ask)
        self.settle(target, lease, ask, relay)

    def leave(self, ask: Ask) -> None:
        """Nobody waits for this request any more."""
        self.watchdog.unwatch(ask.guard)
        ask.guard.show_life(None)

    def settle(self, target: Target, lease: Lease, ask: Ask, relay: Relay) -> None:
        """What one provider's part of a stream cost, and what its end means."""
        self.charge(target, relay.tokens, ask)
        if relay.failure:
            ask.trace.note(step_of(target, lease, failed(relay.failure, in_ok=True)))
            self.learn(target, lease, failed(relay.failure, in_ok=True), ask.guard)

    def charge(self, target: Target, tokens: Tokens | None, ask: Ask) -> None:
        if tokens is None:
            return
        self.lessons.disprove(target.provider, target.model, tokens.prompt)
        self.notice_cut(target, tokens.prompt, ask)
        facts = target.facts
        cost = None
        if facts.price_in is not None and facts.price_out is not None:
            cost = (tokens.prompt * facts.price_in + tokens.completion * facts.price_out) / 1e6
        self.usage.spent(target.provider, tokens, cost)
        ask.trace.spent(tokens.prompt, tokens.completion, cost)

    def notice_cut(self, target: Target, counted: int, ask: Ask) -> None:
        """Ollama cuts a long prompt without a word; its count gives that away (Reasonix#10245)."""
        suspicious = 0 < 2 * counted + CUT_TOKENS < ask.tokens
        if not suspicious or target.service.provider.tier != "local" or wants_vision(ask.chat):
            return
        if self.lessons.first_cut(target.provider, target.model):
            log.warning(
                "%s counted %d of about %d prompt tokens: it may have cut the prompt; raise its"
                " context length (Ollama: OLLAMA_CONTEXT_LENGTH)",
                target.label,
                counted,
                ask.tokens,
            )

    # -- helpers ---------------------------------------------------------------------------

    @property
    def echoes(self) -> bool:
        """Nothing is configured and the built-in echo stands in."""
        return not self.config.services and self.config.echo_fallback

    def size(self, ask: Ask) -> int:
        """The request in tokens; counted exactly only where a decision hangs on it."""
        estimate = token_bounds(text_bytes(ask.raw), ask.chat)
        bounds = [
            s.skip_tokens_over for s in self.directory.services.values() if s.skip_tokens_over
        ]
        if self.config.fast_route_threshold:
            bounds.append(self.config.fast_route_threshold)
        if any(estimate.exceeds(bound) is None for bound in bounds):
            self.encoder.start()  # in the background; until it is loaded the estimate decides
            return count_tokens(ask.chat, self.encoder) or estimate.likely
        return estimate.likely

    def exhausted(self, walk: Walk, tokens: int, late: bool) -> RouterError:
        """The one error that says honestly why nobody answered."""
        told = walk.told()
        if error := self.clients_own(walk, told):
            return self.sized(error, walk, tokens)
        if not walk.tried and not walk.waits:
            return self.nobody(tokens)
        wait = self.soonest(walk)
        if walk.limited and not late:
            return OverLimit(
                "every provider that could serve this is rate limited", retry_after=wait, tried=told
            )
        why = "the request's deadline passed" if late else "All providers exhausted"
        code = None
        if keys := self.rejected_keys(walk):
            why = f"{why}: {keys}"
            only = {DEAD_KEY.name} == walk.verdicts | {reason for _, reason in walk.whys}
            code = "provider_keys_rejected" if only else None
        text = f"{why}: {'; '.join(told)[:1500]}"
        return Exhausted(text, code=code, retry_after=wait, tried=told)

    @staticmethod
    def clients_own(walk: Walk, told: Sequence[str]) -> RouterError | None:
        """The 400 that the request itself earned: of all reasons the one that tells most."""
        found = [a for _, a in walk.tried if a.verdict and client_side(a.verdict, a.outcome)]
        stopped = [a for a in found if a.verdict and a.verdict.then == "stop"]
        if not stopped and (not found or len(found) < len(walk.tried)):
            return None
        names = [(CLIENT_SIDE.index(a.verdict.name), a) for a in stopped or found if a.verdict]
        rank = min(rank for rank, _ in names)
        if walk.waits and rank >= CLIENT_SIDE.index(UNFIT.name):
            return None  # one that rests might have served it
        texts = [a.outcome.text for at, a in names if at == rank]
        name, text = CLIENT_SIDE[rank], max(texts, key=len)
        overflow = name in (OVERFLOW.name, TOO_LARGE.name)
        return BadRequest(
            text or "the provider rejected the request",
            param="messages" if overflow else None,
            code="context_length_exceeded" if overflow else CLIENT_CODES.get(name),
            tried=told,
        )

    def rejected_keys(self, walk: Walk) -> str:
        """Where the keys stand that providers refuse, or ''; never the keys."""
        refused = [label.partition("/")[0] for label, a in walk.tried if a.verdict is DEAD_KEY]
        refused += [provider for provider, why in walk.whys if why == DEAD_KEY.name]
        lines = []
        for name in dict.fromkeys(refused):
            service = self.directory.services.get(name)
            places = dict.fromkeys(service.key_sources if service else ())
            lines.append(f"{name} refuses its keys, check {', '.join(places) or 'them'}")
        return "; ".join(lines)

    @staticmethod
    def sized(error: RouterError, walk: Walk, tokens: int) -> RouterError:
        """Too long for everybody: the error in the words of whoever takes the most."""
        overflows = walk.overflows()
        if error.code != OVERFLOW_CODE or not overflows:
            return error
        most = walk.largest
        best = max(overflows, key=lambda attempt: attempt.sizes.most)
        asked = max(best.sizes.asked or tokens, most + 1)
        text = best.outcome.text or error.message
        if best.sizes.most < most:
            text = f"the request has {asked} tokens, more than any candidate takes (at most {most})"
        told = BadRequest(text, param=error.param, code=error.code, tried=error.tried)
        told.sizes = (asked, most) if most else (0, 0)
        return told

    @staticmethod
    def soonest(walk: Walk) -> float | None:
        """Seconds until the first of those that rest is ready again."""
        rests = [a.rest_s for _, a in walk.tried if a.verdict and a.verdict.rests]
        return min([*walk.waits, *rests], default=None)

    def nobody(self, tokens: int) -> RouterError:
        """No candidate at all: say which setting made it so."""
        ceilings = [
            t.service.skip_tokens_over for t in self.directory.targets if too_large(t, tokens)
        ]
        if ceilings:
            error = BadRequest(
                f"the request has about {tokens} tokens, more than any configured provider takes",
                param="messages",
                code="context_length_exceeded",
            )
            error.sizes = (tokens, max(ceilings))
            return error
        return Exhausted(
            "no provider can serve this request: none is configured, or none within the reach"
            " of this key or profile (see GET /v1/status)"
        )


# What an offer's name adds to the model's: not a size such as `:8b`, which is another model.
EMBEDDING_OFFER: Final = re.compile(r":(?:free|latest|nitro|floor)$")


class Rescue:
    """One stream that broke off, and who may go on with it; tried once."""

    MOST: ClassVar[int] = 3  # candidates asked

    def __init__(
        self,
        router: Router,
        ask: Ask,
        walk: Walk,
        routes: Iterator[tuple[Target, Lease]],
        route: tuple[Target, Lease],
        deadline: float,
    ) -> None:
        self._router, self._ask, self._walk = router, ask, walk
        self._routes, self._route, self._deadline = routes, route, deadline

    def go_on(self, relay: Relay) -> Relay | None:
        """The stream of somebody who goes on honestly, or None. ClientGone may be raised."""
        ask, failure = self._ask, relay.flow.failure
        if failure is None or judge(failure, in_ok=True).then == "stop":
            return None
        said = relay.flow.said()
        if said is None:
            return None
        target, lease = self._route
        self._router.settle(target, lease, ask, relay)
        relay.on_close = lambda _: self._router.leave(ask)
        self._walk.out.add(target.label)
        others = itertools.chain(self._routes, [self._route])
        for second, key in itertools.islice(others, self.MOST):
            attempt = self._ask_to_go_on(second, key, said)
            if attempt and attempt.stream:
                log.warning(
                    "%s: %s broke off after %d characters, %s goes on",
                    ask.request_id, target.label, len(said.text), second.label,
                )  # fmt: skip
                self._router.deliver(second, key, ask, attempt, 1)
                ask.trace.rescuer = second.label
                return attempt.stream
        return None

    def _ask_to_go_on(self, target: Target, lease: Lease, said: Said) -> Attempt | None:
        """First with what was said as its own words, then the plain question once more."""
        for prefilled in (True, False):
            if prefilled and not (said.text and target.goes_on):
                continue
            ask = continuing(self._ask, said, prefilled)
            attempt = self._router.attempt(target, lease, ask, self._deadline)
            ask.trace.note(step_of(target, lease, attempt))
            if attempt.verdict is None:
                return attempt
            self._walk.rule(target, attempt.verdict)
            self._router.learn(target, lease, attempt, ask.guard)
            if attempt.verdict.rests or attempt.verdict.counts:
                return None
        return None


def continuing(ask: Ask, said: Said, prefilled: bool) -> Ask:
    """The request for somebody who goes on: it is read as chat, and told in one stream."""
    chat = {**ask.chat, "stream": True}
    if prefilled:
        chat["messages"] = [*chat["messages"], {"role": "assistant", "content": said.text}]
    surface = replace(ask.surface, dialect="")  # never as it comes
    return replace(
        ask,
        surface=surface,
        chat=chat,
        kept_body=(NOBODY, b""),
        make_flow=lambda passage: Continuation(passage, said, prefilled),
    )


def embedding_family(model: str) -> str:
    """Models whose vectors may be compared: the same id whatever the provider calls it."""
    return EMBEDDING_OFFER.sub("", model.lower().rpartition("/")[2])


ECHO_HELP: Final = (
    "This is hermes-router's built-in echo: no provider is configured yet. Add a key, for example"
    " GEMINI_API_KEY=... or GROQ_API_KEY=..., to .env and start again. You said: "
)


def echo_answer(ask: Ask) -> Answer:
    """The answer of the built-in echo, whole or streamed, in the client's dialect."""
    text = ECHO_HELP + (last_user_text(ask.chat) or "(nothing)")
    head = {"id": f"chatcmpl-{ask.request_id}", "created": int(time.time()), "model": "echo"}
    message = {"role": "assistant", "content": text}
    asked, said = len(ask.raw) // 4, len(text) // 4
    usage = {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    reply = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
    passage = Passage(DIALECTS["chat"], ask, "echo")
    if not ask.stream:
        whole = passage.whole(dump_json(reply))
        return Answer(whole.body, "application/json", "echo", "echo", 1, final=whole.final)
    flow = passage.flow()
    relay = Relay(None, flow, EventCutter())
    relay.held = flow.take(b"".join(echo_events(head, text, usage)))
    return Answer(relay, "text/event-stream", "echo", "echo", 1)


def echo_events(head: Json, text: str, usage: Json) -> Iterator[bytes]:
    """One event per word, a finish, usage, and the end."""

    def event(delta: Json, finish: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return encode_event({**head, "object": "chat.completion.chunk", "choices": [choice]})

    yield event({"role": "assistant", "content": ""}, None)
    for word in re.findall(r"\S+\s*|\s+", text):
        yield event({"content": word}, None)
    yield event({}, "stop")
    yield encode_event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
    yield DONE


# =============================================================================
# 34. Status
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
        "lessons": router.lessons.snapshot(name),
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


def anthropic_models(rows: Sequence[Json]) -> Json:
    """The same list for a client that sent `anthropic-version`."""
    data = [anthropic_model(row) for row in rows]
    return {
        "data": data,
        "has_more": False,
        "first_id": data[0]["id"],
        "last_id": data[-1]["id"],
    }


def anthropic_model(row: Json) -> Json:
    made = {"type": "model", "id": row["id"], "display_name": row["id"]}
    sizes = {
        "max_input_tokens": row.get("context_length"),
        "max_tokens": row.get("max_output_tokens"),
    }
    return {**made, "created_at": "2026-01-01T00:00:00Z", **{k: v for k, v in sizes.items() if v}}


def codex_model(row: Json) -> Json:
    """A row as Codex CLI asks for it (GET /v1/models?client_version=, seen 2026-10)."""
    return {
        "slug": row["id"],
        "display_name": row["id"],
        "context_window": row.get("context_length"),
        "supported_in_api": True,
        "visibility": "list",
    }


LOG_FILTERS: Final = {
    "status": ("cache_hit", "cancelled", "error", "success"),
    "endpoint": ("chat", "completions", "embeddings", "messages", "responses"),
}


def may_see(caller: Caller, trace: Trace) -> bool:
    """An admin sees every request, the others their own."""
    return caller.admin or caller.id == trace.caller.id


def log_entries(router: Router, caller: Caller, wanted: Mapping[str, str]) -> Json:
    """The latest requests that `caller` may see and that fit `wanted`."""
    size, latest = router.traces.size, router.traces.latest()
    limit = wanted.get("limit", "")
    most = min(int(limit) if re.fullmatch(r"[0-9]{1,6}", limit) else 100, size)
    keys = (("status", "outcome"), ("endpoint", "endpoint"), ("provider", "provider"))
    asked = [(member, value) for name, member in keys if (value := wanted.get(name))]
    fitting = (
        trace
        for trace in latest
        if may_see(caller, trace) and all(getattr(trace, member) == v for member, v in asked)
    )
    entries = [log_entry(trace) for trace in itertools.islice(fitting, most)]
    return {
        "buffer_size": size,
        "stored": len(latest),
        "returned": len(entries),
        "entries": entries,
    }


def log_entry(trace: Trace) -> Json:
    hit = trace.outcome == "cache_hit"
    return {
        "id": trace.id,
        "ts": utc_text(trace.at),
        "endpoint": trace.endpoint,
        "caller": key_tail(trace.caller.key) or trace.caller.name,
        "caller_name": trace.caller.name,
        "streaming": trace.streaming,
        "asked": trace.asked,
        "complexity": trace.level,
        "est_tokens": trace.tokens,
        "provider": "cache" if hit else trace.provider or None,
        "model": trace.model or None,
        "latency_ms": round(1000 * trace.seconds, 1),
        "ttft_ms": None if trace.ttft_s is None else round(1000 * trace.ttft_s, 1),
        "cascades": sum(step.verdict != "ok" for step in trace.steps),
        "status": trace.outcome,
        "http_status": trace.status,
        "prompt_tokens": trace.prompt,
        "completion_tokens": trace.completion,
        "cost_usd": None if trace.cost is None else round(trace.cost, 6),
        "error": trace.error or None,
    }


def utc_text(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def explain(router: Router, trace: Trace) -> Json:
    """Which candidates, in what order and why, who was asked, what was passed over, what it cost.

    The order is the planned one; health may have moved an ill provider back.
    """
    plan = cast("Arrangement | None", trace.plan)
    order = plan.order() if plan else []
    skipped = {line.partition(": ")[0]: "skipped" for line in trace.skipped}
    states = skipped | {step.label: step.verdict for step in trace.steps}
    absent = {c.target.label for c in order}
    return {
        **log_entry(trace),
        "choice": trace.choice or None,
        "difficulty": DIFFICULTY_LABELS.get(trace.level) if trace.level else None,
        "candidates": [
            {
                "candidate": candidate.target.label,
                "why": candidate.why,
                "outcome": states.get(candidate.target.label, "not asked"),
            }
            for candidate in order
        ],
        "left_out": [
            {"candidate": target.label, "why": why}
            for target in router.directory.targets
            if plan
            and target.label not in absent
            and (why := why_not(target, plan.traits, trace.tokens))
        ],
        "skipped": list(trace.skipped),
        "attempts": [{**step._asdict(), "seconds": round(step.seconds, 3)} for step in trace.steps],
        "cache": trace.cache,
        "rescued_by": trace.rescuer or None,
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


HISTOGRAMS: Final = (
    ("request_latency_seconds", "endpoint", "Seconds from a request to the end of its answer."),
    ("time_to_first_token_seconds", "provider", "Seconds to a stream's first useful event."),
    ("prompt_tokens", "endpoint", "Tokens of prompts."),
)


def histogram_lines(router: Router) -> Iterator[str]:
    for key, label, help in HISTOGRAMS:
        name = "hermes_router_" + key
        yield f"# HELP {name} {help}"
        yield f"# TYPE {name} histogram"
        bounds = [*(f"{bound:g}" for bound in router.traces.histograms[key].bounds), "+Inf"]
        for value, row in router.traces.shapes(key):
            counts = itertools.accumulate(row[:-1])
            for bound, count in zip(bounds, counts, strict=True):
                yield f"{name}_bucket{labels_text({label: value, 'le': bound})} {count}"
            yield f"{name}_sum{labels_text({label: value})} {row[-1]!r}"
            yield f"{name}_count{labels_text({label: value})} {sum(row[:-1])}"


def prometheus(router: Router) -> str:
    """GET /metrics, text format 0.0.4: counts and timings, no key material."""
    lines = [*histogram_lines(router)]
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
# 35. Dashboard
# =============================================================================

# One static page: what it shows it asks the endpoints for, with the key that was typed into it.
DASHBOARD: Final = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>hermes-router</title>
<style>
:root { --bg: #fbfbf9; --card: #fff; --text: #1d2126; --dim: #5b6470; --line: #dcdfe3; --link: #1f4fb8;
  --good: #1a6e37; --warn: #8a5300; --bad: #b3261e; color-scheme: light; }
:root[data-theme=dark] { --bg: #14171b; --card: #1c2026; --text: #e4e7ea; --dim: #9ba5b1; --line: #333a43;
  --link: #8ab4ff; --good: #6fd08c; --warn: #f0b75e; --bad: #ff8a80; color-scheme: dark; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
header { display: flex; flex-wrap: wrap; gap: .25rem 1rem; align-items: center; padding: .5rem 1rem;
  border-bottom: 1px solid var(--line); background: var(--card); }
h1 { font-size: 1.05rem; margin: 0; } h2 { font-size: 1.15rem; margin: 1.25rem 0 .5rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem; flex: 1; }
nav a { padding: .3rem .6rem; border-radius: .4rem; color: var(--text); text-decoration: none; }
nav a[aria-current] { background: var(--link); color: var(--card); }
main { padding: 0 1rem 3rem; max-width: 76rem; margin: auto; outline: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.card b { display: block; font-size: 1.3rem; font-weight: 600; overflow-wrap: anywhere; }
.dim, caption { color: var(--dim); } .good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.wide { overflow-x: auto; margin: .6rem 0; border: 1px solid var(--line); border-radius: .5rem; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .5rem .7rem; }
th, td { text-align: left; padding: .35rem .7rem; border-top: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; white-space: nowrap; } td { overflow-wrap: break-word; max-width: 24rem; }
.n { text-align: right; white-space: nowrap; }
button, input, select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--dim);
  border-radius: .4rem; padding: .3rem .6rem; max-width: 100%; }
button { cursor: pointer; } button.link { border: 0; background: none; color: var(--link); padding: 0; text-decoration: underline; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
form { display: flex; flex-wrap: wrap; gap: .6rem; align-items: end; margin: .6rem 0; }
label { display: grid; gap: .15rem; font-size: .9rem; justify-items: start; }
dialog { max-width: min(60rem, 95vw); border: 1px solid var(--line); border-radius: .6rem; background: var(--bg); color: var(--text); }
#note { min-height: 1.5em; } code { overflow-wrap: anywhere; }
.skip { position: absolute; left: -99rem; } .skip:focus { left: .5rem; top: .5rem; background: var(--card); padding: .5rem; }
@media (max-width: 40rem) { nav { order: 9; flex-basis: 100%; } h1 { flex: 1; } }
</style>
</head>
<body>
<a class="skip" href="#main" id="skip">Skip to content</a>
<header>
<h1>hermes-router</h1>
<nav aria-label="Pages" id="pages"></nav>
<span id="state" class="dim"></span>
<button id="theme" type="button">Theme</button>
<button id="leave" type="button" hidden>Log out</button>
</header>
<main id="main" tabindex="-1"><p id="note" role="status" aria-live="polite"></p><div id="page"></div></main>
<dialog id="dialog" aria-labelledby="dialog-title"><form method="dialog"><button id="close">Close</button></form><div id="detail"></div></dialog>
<noscript>This page needs JavaScript. The same is at /v1/status, /v1/usage and /v1/logs, with your key.</noscript>
<script>
"use strict";
const $ = id => document.getElementById(id);
const EVERY_MS = 5000;
let key = sessionStorage.getItem("hermes-key") || "", data = {}, shown = "", timer = 0;

// Everything on this page is made here, as text: no answer of the router is ever read as HTML.
function h(tag, props, ...kids) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...kids.flat().filter(kid => kid != null));
  return made;
}
const num = n => n == null ? "–" : Number(n).toLocaleString("en");
const ms = n => n == null ? "–" : n < 1000 ? Math.round(n) + " ms" : (n / 1000).toFixed(1) + " s";
const usd = n => n == null ? "–" : "$" + Number(n).toFixed(n && n < 1 ? 4 : 2);
const pct = n => n == null ? "–" : Math.round(100 * n) + " %";
const span = s => s == null ? "–" : s < 90 ? Math.round(s) + " s" : s < 5400 ? Math.round(s / 60) + " min" : s < 172800 ? (s / 3600).toFixed(1) + " h" : Math.round(s / 86400) + " days";
const mark = (kind, text) => h("span", { class: kind }, text);
const list = value => Array.isArray(value) ? value : [];
const rows = value => value && typeof value === "object" ? Object.entries(value) : [];
const cards = pairs => h("div", { class: "cards" }, pairs.map(([name, value, kind]) =>
  h("div", { class: "card" }, h("span", { class: "dim" }, name), h("b", { class: kind }, String(value)))));

function table(caption, heads, lines) {
  const cell = value => value instanceof Cell ? h("td", { class: "n" }, value.text)
    : h("td", {}, value instanceof Node || Array.isArray(value) ? value : value == null ? "–" : String(value));
  return h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": caption }, h("table", {}, h("caption", {}, caption),
    h("thead", {}, h("tr", {}, heads.map((head, n) => h("th", { scope: "col", class: lines[0]?.[n] instanceof Cell ? "n" : null }, head)))),
    h("tbody", {}, lines.length ? lines.map(line => h("tr", {}, line.map(cell)))
      : h("tr", {}, h("td", { colspan: heads.length, class: "dim" }, "nothing yet")))));
}
class Cell { constructor(text) { this.text = String(text); } }
const right = text => new Cell(text);

function field(label, props, options) {
  const input = options ? h("select", props, options.map(value => h("option", { value, selected: value === props.value }, value || "–")))
    : h("input", { autocomplete: "off", ...props });
  return h("label", {}, label, input);
}
function form(id, submit, label, ...fields) {
  return h("form", { id, onsubmit: event => {
    event.preventDefault();
    const given = Object.fromEntries(new FormData(event.target));
    attempt(async () => { await submit(given, event.target); });
  } }, fields, h("button", { id: id + "-go" }, label));
}
const button = (id, label, run, sure) => h("button", { id, type: "button", class: "link", onclick: () => {
  if (!sure || confirm(sure)) attempt(run);
} }, label);

async function api(path, method, body) {
  const answer = await fetch(path, { method: method || "GET", cache: "no-store", credentials: "omit", redirect: "error",
    headers: { Authorization: "Bearer " + key, ...(body ? { "Content-Type": "application/json" } : {}) },
    body: body ? JSON.stringify(body) : undefined });
  const told = await answer.json().catch(() => ({}));
  if (answer.status === 401) { gate("This key is not accepted."); throw new Error("This key is not accepted."); }
  if (!answer.ok) throw Object.assign(new Error(told.error?.message || answer.statusText), { status: answer.status });
  return told;
}
function note(text, kind) { $("note").textContent = text; $("note").className = kind || ""; }
async function attempt(run) {
  try { await run(); await refresh(true); } catch (error) { note(error.message, "bad"); }
}
async function change(path, method, body, said) {
  const told = await api("/v1/config/" + path, method, body || {});
  note(said + (told.restart_required ? " It takes effect after a restart." : ""), "good");
  return told;
}
const enc = encodeURIComponent;

const PAGES = {
  overview: { title: "Overview", draw: drawOverview }, providers: { title: "Providers", draw: drawProviders },
  models: { title: "Models", draw: drawModels }, callers: { title: "Callers", draw: drawCallers },
  log: { title: "Log", draw: drawLog }, cache: { title: "Cache", draw: drawCache },
  settings: { title: "Settings", draw: drawSettings } };
const page = () => PAGES[location.hash.slice(1)] ? location.hash.slice(1) : "overview";

function health(name, row) {
  if (row.out_of_use) return mark("dim", "not used: " + row.out_of_use);
  if (row.breaker?.open) return mark("bad", "resting, asked again in " + span(row.breaker.opens_in_s));
  const keys = list(row.keys), ready = keys.filter(k => k.status === "ready").length;
  if (keys.length && !ready) return mark("warn", "all keys rest, back in " + span(Math.min(...keys.map(k => k.ready_in))));
  if ((row.stats?.error_rate || 0) >= 0.1) return mark("warn", "degraded, " + pct(row.stats.error_rate) + " errors");
  return mark("good", row.stats?.total_requests ? "well" : "not asked yet");
}
function drawOverview() {
  const s = data.status, u = data.usage || {}, names = rows(s.providers);
  const failing = names.filter(([, p]) => p.breaker?.open).length, dry = names.flatMap(([name, p]) => list(p.quota).filter(q => q.dry_at).map(q => [name, q]));
  return [h("h2", {}, "Overview"), cards([["mode", s.mode], ["up", span(s.uptime_s)], ["in flight", num(s.in_flight)],
    ["providers", names.length - failing + " of " + names.length, failing ? "warn" : ""],
    ["tokens", num(u.totals?.tokens)], ["cost", usd(u.totals?.cost?.usd)],
    ["cache hits", s.cache?.enabled ? pct(s.cache.hit_rate) : "off"], ["version", s.version]]),
  list(s.warnings).map(text => h("p", { class: "warn" }, text)), s.config?.error ? h("p", { class: "bad" }, "The settings file has a problem, the old settings stay: " + s.config.error) : null,
  dry.length ? table("Quotas that run dry", ["provider", "key", "model", "dry at", "back at"], dry.map(([name, q]) => [name, q.key_tail, q.model, q.dry_at, q.resets_at])) : null,
  table("Providers", ["provider", "health", "requests", "errors", "mean time", "tokens", "cost"], names.map(([name, p]) => [name, health(name, p),
    right(num(p.stats?.total_requests)), right(num(p.stats?.errors)), right(ms(p.stats?.avg_latency_ms)), right(num(p.tokens)), right(usd(p.cost_usd))]))];
}
function drawProviders() {
  const known = list(data.providers?.key_settable), removable = data.admin;
  return [h("h2", {}, "Providers"), data.admin ? form("add-key", async (given, made) => {
    const told = await change("keys/" + enc(given.provider), "POST", { key: given.key }, "");
    note(told.duplicate ? "That key was there already." : "Added; " + given.provider + " has " + told.total_keys + " key(s) now.", "good"); made.reset();
  }, "Add key", field("Provider", { name: "provider", required: true }, known), field("Key", { name: "key", type: "password", required: true })) : readOnly(),
  rows(data.status.providers).map(([name, p]) => [h("h2", {}, name), h("p", {}, health(name, p), " · ", p.tier || "", p.note ? " · " + p.note : ""),
    table("Keys of " + name, ["key", "state", "ready in", "handed out", "resting for"], list(p.keys).map(k => [k.key_tail, mark(k.status === "ready" ? "good" : "warn", k.status),
      right(k.ready_in ? span(k.ready_in) : "–"), right(num(k.requests)), rows(k.models).map(([m, r]) => m + ": " + r.why).join(", ") || "–"])),
    list(p.quota).length ? table("Quota of " + name, ["key", "model", "per", "left", "of", "back at", "runs dry"], p.quota.map(q => [q.key_tail, q.model, q.window, right(num(q.remaining)), right(num(q.limit)), q.resets_at, q.dry_at ? mark("warn", q.dry_at) : "–"])) : null])];
}
function readOnly() { return h("p", { class: "dim" }, "This key may look but not change anything: log in with an admin key (ADMIN_KEYS, or the first key)."); }
function drawModels() {
  const settable = list(data.providers?.model_settable);
  return [h("h2", {}, "Models"), data.admin ? form("set-model", given => given.model.trim() ? change("model/" + enc(given.provider), "POST", { model: given.model }, "Models of " + given.provider + " are set.")
    : change("model/" + enc(given.provider), "DELETE", null, given.provider + " has its default models again."), "Set models",
  field("Provider", { name: "provider", required: true }, settable), field("Models, comma list; empty = default", { name: "model", size: "40" })) : readOnly(),
  table("Candidates", ["provider", "model", "rating", "tools", "images", "reasoning", "window", "cost"], rows(data.status.providers).flatMap(([name, p]) =>
    list(p.model_caps).map(m => [name, m.model, right(m.rating), m.supports_tools ? "yes" : "no", m.supports_vision ? "yes" : "no", m.reasoning ? "yes" : "no", right(num(m.context_window)), right(["free", "low", "medium", "high", "very high"][m.cost_bucket] ?? m.cost_bucket)])))];
}
const QUOTAS = [["rpm", "requests/min"], ["req_per_day", "requests/day"], ["tokens_per_day", "tokens/day"], ["cost_per_day", "USD/day"]];
const limits = given => Object.fromEntries(QUOTAS.map(([name]) => [name, Number(given[name] || 0)]));
function drawCallers() {
  const used = Object.fromEntries(list(data.usage?.keys).map(row => [row.key_tail, row])), keys = list(data.callers?.keys);
  const inputs = row => QUOTAS.map(([name, label]) => field(label, { name, type: "number", min: "0", step: name === "cost_per_day" ? "any" : "1", value: row.limits?.[name] || "", size: "8" }));
  if (!data.admin) return [h("h2", {}, "Callers"), readOnly(), usedTable(list(data.usage?.keys))];
  return [h("h2", {}, "Callers"), form("new-caller", async (given, made) => {
    const scope = given.providers.split(",").map(x => x.trim()).filter(Boolean);
    const told = await change("proxy-keys", "POST", { name: given.name, allowed_providers: scope, ...limits(given) }, "");
    made.reset(); tell("A new key for " + (told.name || "a caller"), h("p", {}, "Shown only now: "), h("p", {}, h("code", { id: "new-key" }, told.key)), h("button", { id: "copy", onclick: () => navigator.clipboard.writeText(told.key) }, "Copy"));
  }, "New key", field("Name", { name: "name", maxlength: "80" }), field("Only these providers, comma list", { name: "providers" }), inputs({})),
  keys.map((row, n) => h("section", { "aria-label": row.name || row.key_tail }, h("h2", {}, (row.name || "key") + " …" + row.key_tail), h("p", { class: "dim" }, (row.admin ? "admin · " : "") + (list(row.allowed_providers).join(", ") || "all providers")),
    form("limit-" + n, given => change("proxy-keys/" + enc(row.key_tail), "POST", limits(given), "Limits of …" + row.key_tail + " are set (0 = none)."), "Set limits", inputs(row)),
    button("revoke-" + n, "Revoke", () => change("proxy-keys/" + enc(row.key_tail), "DELETE", null, "Revoked …" + row.key_tail + "."), "Revoke the key …" + row.key_tail + "? Its clients get 401 at once."), usedTable(used[row.key_tail] ? [used[row.key_tail]] : [])))];
}
function usedTable(lines) {
  return table("Used", ["key", "requests today", "tokens today", "cost today", "this minute", "requests in all", "tokens in all", "cost in all"], lines.map(k => [k.key_tail, right(num(k.req_today)), right(num(k.tokens_today)), right(usd(k.cost_today)),
    right(num(k.rpm_window)), right(num(k.req_total)), right(num(k.tokens_total)), right(usd(k.cost_total))]));
}
const KINDS = { success: "good", cache_hit: "good", error: "bad", cancelled: "dim" };
function drawLog() {
  const wanted = sessionStorage.getItem("hermes-log") || "";
  const pick = field("Show", { id: "log-filter", value: wanted, onchange: event => { sessionStorage.setItem("hermes-log", event.target.value); draw(true); } }, ["", ...Object.keys(KINDS)]);
  return [h("h2", {}, "Latest requests"), pick, table("No content is kept, only what became of each request", ["time (UTC)", "caller", "endpoint", "asked", "answered by", "result", "time", "first token", "tokens", "failed attempts", ""], list(data.logs?.entries).filter(e => !wanted || e.status === wanted).map(e => [
    e.ts.slice(11, 19), e.caller_name || e.caller, e.endpoint + (e.streaming ? ", stream" : ""), e.asked || "–", e.model ? e.provider + "/" + e.model : "–", mark(KINDS[e.status] || "", e.status + (e.status === "error" ? " " + e.http_status : "")),
    right(ms(e.latency_ms)), right(ms(e.ttft_ms)), right(num(e.prompt_tokens) + " / " + num(e.completion_tokens)), right(num(e.cascades)), button("why-" + e.id, "why", () => why(e.id))]))];
}
async function why(id) {
  const w = await api("/v1/why/" + enc(id));
  tell("Why " + id, h("p", {}, [w.choice, w.difficulty && "difficulty " + w.complexity + " (" + w.difficulty + ")", "about " + num(w.est_tokens) + " tokens", "cache: " + w.cache, w.rescued_by && "gone on with by " + w.rescued_by, w.cost_usd != null && usd(w.cost_usd)].filter(Boolean).join(" · ")),
    w.error ? h("p", { class: "bad" }, w.error) : null,
    table("Attempts", ["candidate", "key", "verdict", "status", "seconds", "reason"], list(w.attempts).map(a => [a.label, a.key_tail, mark(a.verdict === "ok" ? "good" : "bad", a.verdict), right(a.status || "–"), right(a.seconds), a.text || "–"])),
    table("Candidates in order", ["candidate", "why there", "outcome"], list(w.candidates).map(c => [c.candidate, c.why, c.outcome])),
    list(w.left_out).length ? table("Left out", ["candidate", "why"], w.left_out.map(c => [c.candidate, c.why])) : null,
    list(w.skipped).length ? h("ul", {}, w.skipped.map(text => h("li", {}, text))) : null);
}
function tell(title, ...content) {
  $("detail").replaceChildren(h("h2", { id: "dialog-title" }, title), ...content.filter(Boolean));
  if (!$("dialog").open) $("dialog").showModal();
}
function drawCache() {
  const c = data.status.cache || {}, sem = c.semantic || {};
  return [h("h2", {}, "Cache"), cards([["exact", c.enabled ? "on" : "off"], ["kept for", span(c.ttl_s)], ["entries", num(c.size) + " of " + num(c.max_size)], ["persistent", c.persistent ? "yes" : "no"], ["hits", num(c.hits)], ["misses", num(c.misses)], ["hit rate", pct(c.hit_rate)],
    ["semantic", sem.enabled ? "on, from " + sem.threshold : "off"], ["semantic hits", num(sem.hits)]])];
}
function drawSettings() {
  const addons = list(data.status.features?.addons);
  return [h("h2", {}, "Settings"), data.admin ? null : readOnly(),
    table("Features", ["feature", "state", "setting", ""], addons.map(f => [f.title || f.name, mark(f.enabled ? "good" : "dim", f.enabled ? "on" : "off"), f.env || f.manage || "–",
      data.admin && f.kind === "flag" ? button("feature-" + f.name, f.enabled ? "turn off" : "turn on", () => change("features/" + enc(f.name), "POST", { enabled: !f.enabled }, (f.title || f.name) + " is " + (f.enabled ? "off." : "on."))) : null])),
    data.admin ? form("rotation", given => change("rotation", "POST", { mode: given.mode }, "Keys are used " + given.mode + "."), "Set", field("Order of a provider's keys", { name: "mode", value: data.status.rotation?.mode }, ["round-robin", "sequential"])) : null,
    data.admin ? form("setting", (given, made) => change("settings", "POST", { [given.name]: given.value === "" ? null : given.value }, given.name + (given.value === "" ? " has its default again." : " is set.")).then(() => made.reset()), "Save",
      field("Setting", { name: "name", required: true }, list(data.settings?.settings).filter(x => !x.secret).map(x => x.name)), field("Value; empty = default", { name: "value", size: "30" })) : null,
    data.settings ? table("In effect", ["setting", "value", "from", "meaning"], list(data.settings.settings).map(x => [x.name, Array.isArray(x.value) ? x.value.join(", ") : x.value, x.source, x.help])) : null];
}

function gate(text) {
  clearTimeout(timer);
  key = ""; sessionStorage.removeItem("hermes-key"); $("leave").hidden = true; $("pages").replaceChildren(); $("state").textContent = "";
  if ($("dialog").open) $("dialog").close();
  note(text || "", text ? "bad" : ""); shown = "";
  $("page").replaceChildren(h("h2", {}, "Log in"), h("p", {}, "Paste one of this router's keys; `hr key` prints it. It is kept for this tab only."),
    h("form", { id: "login", onsubmit: event => { event.preventDefault(); key = new FormData(event.target).get("key").trim(); note(""); enter(); } },
      field("Key", { id: "key", name: "key", type: "password", required: true, "aria-describedby": "note" }), h("button", { id: "login-go" }, "Log in")));
  $("key").focus();
}
async function enter() {
  if (!/^[!-~]+$/.test(key)) return gate(key ? "This key is not accepted." : "");
  await refresh(true);
}
// What only some routers or some keys may read is left out where it is refused.
const optional = path => api(path).catch(error => { if (!key) throw error; return null; });
async function refresh(force) {
  clearTimeout(timer);
  const asked = key;
  try {
    const status = await api("/v1/status");
    const [usage, logs, providers, callers, settings] = await Promise.all(["/v1/usage", "/v1/logs?limit=100", "/v1/config/providers", "/v1/config/proxy-keys", "/v1/config/settings"].map(optional));
    if (asked !== key || !key) return;
    data = { status, usage, logs, providers, callers, settings, admin: !!callers };
    sessionStorage.setItem("hermes-key", key); $("leave").hidden = false; $("state").textContent = "live"; $("state").className = "good";
    draw(force);
  } catch (error) {
    if (!key) return;
    $("state").textContent = "no answer from the router"; $("state").className = "bad";
    if (!data.status) gate(error.message);
  }
  if (key) timer = setTimeout(refresh, EVERY_MS);
}
const typing = () => $("page").contains(document.activeElement) && /^(INPUT|SELECT)$/.test(document.activeElement.tagName);
function draw(force) {
  if (!data.status || !key) return;
  const name = page(), { uptime_s, ...steady } = data.status, now = name + JSON.stringify([name === "overview" ? data.status : steady, data.usage?.keys, data.usage?.totals, data.logs?.entries?.[0], data.callers, data.settings, data.providers]);
  if (!force && (typing() || now === shown)) return;
  const focused = document.activeElement?.id; shown = now;
  $("pages").replaceChildren(...Object.entries(PAGES).map(([id, made]) => h("a", { href: "#" + id, id: "to-" + id, "aria-current": id === name ? "page" : null }, made.title)));
  $("page").replaceChildren(...PAGES[name].draw().flat(3).filter(Boolean));
  if (focused) $(focused)?.focus();
}
addEventListener("hashchange", () => { note(""); draw(true); $("main").focus(); document.title = PAGES[page()].title + " – hermes-router"; });
$("skip").addEventListener("click", event => { event.preventDefault(); $("main").focus(); });
$("leave").addEventListener("click", () => { data = {}; gate(""); });
const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");
const paint = () => { root.dataset.theme = sessionStorage.getItem("hermes-theme") || (dark.matches ? "dark" : "light"); };
dark.addEventListener("change", paint); paint();
$("theme").addEventListener("click", () => { sessionStorage.setItem("hermes-theme", root.dataset.theme === "dark" ? "light" : "dark"); paint(); });
key ? enter() : gate("");
</script>
</body>
</html>
"""  # noqa: E501


def dashboard_headers() -> dict[str, str]:
    """Only the page's own style and script may run, and only this router may be asked."""

    def digest(tag: str) -> str:
        text = DASHBOARD.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    rules = (
        "default-src 'none'",
        f"script-src 'sha256-{digest('script')}'",
        f"style-src 'sha256-{digest('style')}'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return {
        "Content-Security-Policy": "; ".join(rules),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


# =============================================================================
# 36. Endpoints
# =============================================================================

ENDPOINT_NAMES: Final = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "messages",
    "/v1/responses": "responses",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
}
PUBLIC: Final = frozenset({"/health", "/", "/favicon.ico", "/dashboard", "/metrics/dashboard"})
HTTP_ERRORS: Final = {404: NotFound, 405: MethodNotAllowed, 413: TooLarge, 415: UnsupportedMedia}
# The server below puts a setter here; called with a function it runs that function
# when the client's connection closes, with None it forgets it.
ON_CLOSE: Final = "hermes.on_client_close"
SEND: Final = "hermes.send"  # a function of the server that sends bytes of a stream at once
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
    page_headers = dashboard_headers()
    routes: tuple[tuple[str, str, Callable[..., Any]], ...] = (
        ("POST", "/v1/chat/completions", lambda: serve_chat(router)),
        ("POST", "/v1/messages", lambda: serve_messages(router)),
        ("POST", "/v1/messages/count_tokens", lambda: serve_count(router)),
        ("POST", "/v1/responses", lambda: serve_responses(router)),
        ("GET", "/v1/responses/<own>", lambda own: serve_stored(router, own)),
        ("GET", "/v1/responses/<own>/input_items", lambda own: serve_input(router, own)),
        ("DELETE", "/v1/responses/<own>", lambda own: delete_stored(router, own)),
        ("POST", "/v1/completions", lambda: serve_completions(router)),
        ("POST", "/v1/embeddings", lambda: serve_embeddings(router)),
        ("GET", "/v1/models", lambda: serve_models(router)),
        ("GET", "/v1/models/<path:model>", lambda model: serve_model(router, model)),
        ("GET", "/v1/status", lambda: snapshot(router)),
        ("GET", "/v1/logs", lambda: serve_logs(router)),
        ("GET", "/v1/why/<id>", lambda id: serve_why(router, id)),
        (
            "GET",
            "/metrics",
            lambda: flask.Response(prometheus(router), mimetype="text/plain; version=0.0.4"),
        ),
        ("GET", "/health", lambda: health(router)),
        ("GET", "/favicon.ico", lambda: ("", 204)),
        ("GET", "/dashboard", lambda: (DASHBOARD, page_headers)),
        ("GET", "/metrics/dashboard", lambda: flask.redirect("/dashboard")),
        ("GET", "/", welcome),
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
        self._callers = [(caller.key.encode(), caller) for caller in config.callers]

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
            return Caller("open", "open")
        raise Unauthorized(
            "unauthorized: send one of this router's keys as `Authorization: Bearer <key>`"
        )


def welcome() -> flask.Response | Json:
    """GET /: the page for a browser, a word for anybody else."""
    kinds = ("application/json", "text/html")
    if current_request().accept_mimetypes.best_match(kinds) == "text/html":
        return cast(flask.Response, flask.redirect("/dashboard"))
    return {"status": "ok", "message": "hermes-router is running; see /v1/models"}


def health(router: Router) -> Json:
    mode = {"mode": "echo"} if router.echoes else {}
    return {"status": "ok", "providers": list(router.directory.services), **mode}


def serve_logs(router: Router) -> Json:
    """GET /v1/logs?limit=&provider=&status=&endpoint=: the newest first, no content."""
    request = current_request()
    for name, allowed in LOG_FILTERS.items():
        if (given := request.args.get(name)) and given not in allowed:
            raise BadRequest(f"{name} must be one of {', '.join(allowed)}", param=name)
    return log_entries(router, request.environ["hermes.caller"], request.args)


def serve_why(router: Router, id: str) -> Json:
    """GET /v1/why/{request id}: how one request was routed."""
    trace = router.traces.find(id)
    if trace is None or not may_see(current_request().environ["hermes.caller"], trace):
        text = f"request {id[:128]!r} is not (or no longer) among the latest {router.traces.size}"
        raise NotFound(text, param="id")
    return explain(router, trace)


def serve_models(router: Router) -> Json:
    """The list in the shape the client expects: OpenAI's, Anthropic's, or Codex's beside it."""
    request, rows = current_request(), model_list(router)
    if "HTTP_ANTHROPIC_VERSION" in request.environ:
        return anthropic_models(rows)
    listed: Json = {"object": "list", "data": rows}
    if "client_version" in request.args:
        listed["models"] = [codex_model(row) for row in rows]
    return listed


def serve_model(router: Router, model: str) -> Json:
    for row in model_list(router):
        if row["id"] == model:
            claude = "HTTP_ANTHROPIC_VERSION" in current_request().environ
            return anthropic_model(row) if claude else row
    raise NotFound(
        f"the model {model[:200]!r} is not listed here", param="model", code="model_not_found"
    )


def serve_chat(router: Router) -> flask.Response:
    request = current_request()
    raw, body = read_body(router, request)
    validate_chat(body)
    ask = make_ask(router, request, CHAT, raw, body, body)
    options = body.get("stream_options") or {}
    ask.wants_usage = bool(options.get("include_usage"))
    return respond_chat(router, request, ask)


def serve_messages(router: Router) -> flask.Response:
    request = current_request()
    raw, body = read_body(router, request)
    ask = make_ask(router, request, MESSAGES, raw, body, messages_to_chat(body))
    ask.wants_usage = True
    ask.forward, ask.left_out = forwarded(request), server_tools(body)
    return respond_chat(router, request, ask)


def forwarded(request: flask.Request) -> bytes:
    """The client's own version and beta headers, for a provider that speaks Messages too."""
    environ = request.environ
    version = environ.get("HTTP_ANTHROPIC_VERSION") or "2023-06-01"
    lines = {"anthropic-version": version}
    if beta := environ.get("HTTP_ANTHROPIC_BETA"):
        lines["anthropic-beta"] = beta
    return header_lines({n: v for n, v in lines.items() if v.isprintable()})


def serve_count(router: Router) -> Json:
    """POST /v1/messages/count_tokens: an estimate until the encoder is loaded."""
    _, body = read_body(router, current_request())
    router.encoder.start()
    return {"input_tokens": count_messages_tokens(body, router.encoder)}


def serve_completions(router: Router) -> flask.Response:
    request = current_request()
    raw, body = read_body(router, request)
    ask = make_ask(router, request, COMPLETIONS, raw, body, completions_to_chat(body))
    ask.wants_usage = True
    return respond_chat(router, request, ask)


def serve_responses(router: Router) -> flask.Response:
    request = current_request()
    raw, body = read_body(router, request)
    validate_responses(body)
    caller, previous = request.environ["hermes.caller"].id, body.get("previous_response_id")
    earlier = router.responses.chain(caller, previous) if previous else []
    surface = responses_surface(is_codex(request, body), earlier)
    ask = make_ask(router, request, surface, raw, body, responses_to_chat(body, earlier))
    ask.wants_usage = True
    ask.left_out = plan_tools(body, earlier).unserved
    items = items_of(body)
    if previous:
        ask.input = [*earlier, *items]

    def keep(final: Json) -> None:
        if body.get("store") is not False and isinstance(own := final.get("id"), str):
            stored = {**final, "previous_response_id": previous}
            router.responses.put(caller, own, items, stored)

    try:
        return respond_chat(router, request, ask, keep)
    except (BadRequest, OverLimit) as error:
        if not told_in_stream(error, ask, is_codex(request, body)):
            raise
        flow = surface.writer(ask.opening, "")
        return flask.Response(
            flow.fail(error), 200, {**STREAM_HEADERS, "Content-Type": "text/event-stream"}
        )


def is_codex(request: flask.Request, body: Json) -> bool:
    """Codex CLI by its headers, or by what only it sends (versions 0.159 to 0.169, 2026-11)."""
    environ = request.environ
    named = environ.get("HTTP_ORIGINATOR", "") + environ.get("HTTP_USER_AGENT", "")
    include = body.get("include")
    sealed = isinstance(include, list) and "reasoning.encrypted_content" in include
    like = body.get("store") is False and "prompt_cache_key" in body and sealed
    return "codex" in named.lower() or like


def told_in_stream(error: RouterError, ask: Ask, codex: bool) -> bool:
    """Agents act upon these only as `response.failed` in a stream (Codex CLI to 0.160)."""
    overflow = error.code == "context_length_exceeded"
    return ask.stream and (overflow or (codex and isinstance(error, OverLimit)))


def stored_response(router: Router, own: str) -> Json:
    caller = current_request().environ["hermes.caller"].id
    found = router.responses.get(caller, own)
    if found is None:
        raise NotFound(f"there is no response {own[:100]!r}", param="response_id")
    return found


def serve_stored(router: Router, own: str) -> Json:
    return stored_response(router, own)


def serve_input(router: Router, own: str) -> Json:
    """GET /v1/responses/{id}/input_items."""
    stored_response(router, own)
    caller = current_request().environ["hermes.caller"].id
    items = router.responses.items(caller, own) or []
    rows = [{"id": f"item_{at}", **item} for at, item in enumerate(items)]
    ends = {"first_id": rows[0]["id"], "last_id": rows[-1]["id"]} if rows else {}
    return {"object": "list", "data": rows, "has_more": False, **ends}


def delete_stored(router: Router, own: str) -> Json:
    stored_response(router, own)
    router.responses.delete(current_request().environ["hermes.caller"].id, own)
    return {"id": own, "object": "response", "deleted": True}


def serve_embeddings(router: Router) -> flask.Response:
    request = current_request()
    raw, body = read_body(router, request)
    validate_embeddings(body)
    ask = make_ask(router, request, EMBEDDINGS, raw, body, body)
    ask.stream = ask.trace.streaming = False
    return respond(router, request, ask, lambda: router.embed(ask))


def read_body(router: Router, request: flask.Request) -> tuple[bytes, Json]:
    """The request as sent and as parsed; RouterError says what is wrong with it."""
    coding = request.environ.get("HTTP_CONTENT_ENCODING", "identity").lower()
    if coding not in ("", "identity"):
        raise UnsupportedMedia(f"request bodies with content encoding {coding[:40]!r} are not read")
    if (request.content_length or 0) > router.config.max_request_bytes:
        raise TooLarge(f"the request is larger than {router.config.max_request_bytes} bytes")
    raw = request.get_data(cache=False)
    return raw, parse_body(raw)


def make_ask(
    router: Router, request: flask.Request, surface: Surface, raw: bytes, body: Json, chat: Json
) -> Ask:
    ask = Ask(surface, raw, body, chat, Guard(), bool(body.get("stream")))
    ask.started, ask.request_id = router.now(), request_id(request)
    ask.caller = request.environ["hermes.caller"]
    asked = str(body.get("model") or "")[:200]
    ask.trace = Trace(
        ask.request_id, surface.dialect, ask.caller, time.time(), ask.started, ask.stream, asked
    )
    request.environ["hermes.trace"] = ask.trace
    ask.fallback = request.environ.get("HTTP_X_ROUTE_FALLBACK", "").lower() == "allow"
    return ask


def respond_chat(
    router: Router,
    request: flask.Request,
    ask: Ask,
    keep: Callable[[Json], None] | None = None,
) -> flask.Response:
    """Answer whatever became a chat; `keep` gets the whole answer once it is known."""
    profile = request.environ.get("HTTP_X_HERMES_PROFILE", "").strip().lower()
    profile = profile if profile in ("fast", "local") else ""
    return respond(router, request, ask, lambda: router.complete(ask, profile), keep)


def respond(
    router: Router,
    request: flask.Request,
    ask: Ask,
    answer: Callable[[], Answer],
    keep: Callable[[Json], None] | None = None,
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
    if made.left_out:
        names = ", ".join(made.left_out).encode("ascii", "replace").decode()
        headers["X-Hermes-Left-Out"] = "".join(filter(str.isprintable, names))[:500]
    if isinstance(made.body, bytes):
        visit.leave(200, made)
        if keep and made.final:
            keep(made.final)
        return flask.Response(made.body, 200, headers)
    relay, send = made.body, request.environ.get(SEND)
    relay.keep = keep
    if send:
        ask.guard.show_life(lambda: send(relay.flow.beat()))
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
            trace = self._ask.trace
            broken = answer and isinstance(answer.body, Relay) and answer.body.broken
            outcome = "cancelled" if status == 499 else "error" if broken else ""
            ended(self._router, trace, status, outcome or "success")
            if status == 499:
                log.info("%s 499 the client left", trace.id)


def ended(router: Router, trace: Trace, status: int, outcome: str, error: str = "") -> None:
    """A request is over: counted, measured, kept for whoever asks why."""
    router.usage.answered(status)
    hit = outcome == "success" and trace.cache in ("hit", "semantic")
    trace.outcome, trace.error = "cache_hit" if hit else outcome, error
    trace.status, trace.seconds = status, max(0.0, router.now() - trace.began)
    router.traces.keep(trace)


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


WORTH_WAITING_S: Final = 60.0  # longer ones are not honoured by the SDKs: they would hammer


def error_response(router: Router, error: RouterError) -> flask.Response:
    """Any RouterError in the envelope of the endpoint's dialect."""
    request = current_request()
    envelope = envelope_for(request.environ, error, request_id(request))
    response = flask.Response(dump_json(envelope), error.status, mimetype="application/json")
    response.headers["X-Request-ID"] = request_id(request)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, OverLimit):
        soon = error.retry_after is None or error.retry_after <= WORTH_WAITING_S
        response.headers["X-Should-Retry"] = "true" if soon else "false"
    if error.attempts:
        response.headers["X-Hermes-Attempts"] = str(error.attempts)
    text = scrub(error.message, 300)
    if trace := trace_of(router, request):
        ended(router, trace, error.status, "error", text)
    else:
        router.usage.answered(error.status)
    log.info("%s %d %s", request_id(request), error.status, text)
    return response


def trace_of(router: Router, request: flask.Request) -> Trace | None:
    """The trace of a request to a model; one that fails before it is understood gets one now."""
    environ = request.environ
    endpoint, caller = ENDPOINT_NAMES.get(request.path), environ.get("hermes.caller")
    if "hermes.trace" not in environ and endpoint and caller:
        now = router.now()
        environ["hermes.trace"] = Trace(request_id(request), endpoint, caller, time.time(), now)
    return cast("Trace | None", environ.get("hermes.trace"))


def envelope_for(environ: Mapping[str, Any], error: RouterError, request_id: str) -> Json:
    """The error as the client of this path reads it; two kinds of client list models."""
    path = environ.get("PATH_INFO", "")
    claude = path.startswith("/v1/models") and "HTTP_ANTHROPIC_VERSION" in environ
    if claude or path.startswith("/v1/messages"):
        return messages_error(error, request_id)
    return error_body(error)


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
# 37. Server
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
        environ[SEND] = self.send_aside
        return environ

    def send_aside(self, data: bytes) -> None:
        """Whole events from another thread, unless there is something to be sent already."""
        if self.wrote_header and not self.channel.total_outbufs_len:
            with suppress(waitress.channel.ClientDisconnected):
                self.write(data)

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


class Parser(waitress.parser.HTTPRequestParser):  # type: ignore[misc]
    """Refuses bodies whose length is told twice, or in a way that is not understood.

    Waitress reads a body with Transfer-Encoding and Content-Length as chunked and keeps the
    connection; whoever stands in front may go by the length and take the rest for another
    request (RFC 9112 section 6.3: to be handled as an error).
    """

    chunked: bool = False
    path: str = ""  # Waitress logs it even where it came to no path

    def parse_header(self, header_plus: bytes) -> None:
        words = header_plus.split(None, 2)
        self.path = words[1].decode("latin-1") if len(words) > 1 else ""  # for its errors
        try:
            super().parse_header(header_plus)
        except waitress.parser.TransferEncodingNotImplemented as error:
            raise waitress.parser.ParsingError(str(error)) from None
        told_twice = self.chunked and "CONTENT_LENGTH" in self.headers
        if told_twice or "TRANSFER_ENCODING" in self.headers:  # it stays there in HTTP/1.0
            self.chunked, self.body_rcv = False, None
            raise waitress.parser.ParsingError("the length of the body is told in two ways")


class JsonErrorTask(waitress.task.ErrorTask):  # type: ignore[misc]
    """What Waitress itself refuses (too large, malformed) in the API's envelope."""

    def execute(self) -> None:
        refused = self.request.error
        kind = HTTP_ERRORS.get(refused.code, BadRequest if refused.code < 500 else RouterError)
        own = f"req_{secrets.token_hex(16)}"
        error = kind(f"{refused.reason}: {refused.body}")
        body = dump_json(envelope_for({"PATH_INFO": self.request.path}, error, own))
        self.status = f"{refused.code} {refused.reason}"
        self.response_headers += [("Content-Type", "application/json"), ("X-Request-ID", own)]
        self.set_close_on_finish()
        self.content_length = self.content_bytes_written = len(body)
        self.wrote_header = True
        self.channel.write_soon(self.build_response_header() + body)
        # Few at a time: strangers who send too much must not occupy every worker.
        drains = self.channel.server.task_dispatcher.drains
        if drains.acquire(blocking=False):
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
    parser_class = Parser
    callback: Callable[[], None] | None = None

    def on_close(self, callback: Callable[[], None] | None) -> None:
        self.callback = callback
        if callback and not self.connected:
            callback()

    def handle_read(self) -> None:
        """What the client sent; nothing where a worker that drains was faster (JsonErrorTask)."""
        try:
            data = self.recv(self.adj.recv_bytes)
        except BlockingIOError:
            return
        except OSError:
            self.handle_close()
            return
        if data:
            self.last_activity = time.time()
            self.received(data)
        else:
            self.connected = False  # recv has closed it

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
        """Send at once what the socket takes; only the rest goes through Waitress's buffers.

        The lock is one that Waitress takes again inside: nothing gets between the two parts.
        """
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


class Drain:
    """Stops the server once its requests have ended; a second signal stops it at once."""

    def __init__(self, router: Router, server: Any, patience_s: float) -> None:
        self._router, self._server, self._patience_s = router, server, patience_s
        self._main = threading.current_thread()

    def on_signal(self, number: int, _frame: object) -> None:
        """In the main thread, which runs the server's loop."""
        gate = self._router.gate
        if gate.closed or not gate.inside:
            sys.exit(0)
        gate.closed = True
        log.info("stopping: %d requests may end within %g s", gate.inside, self._patience_s)
        self._refuse_connections()
        threading.Thread(target=self._wait, args=(number,), name="drain", daemon=True).start()

    def _refuse_connections(self) -> None:
        sockets = getattr(self._server, "_map", None) or getattr(self._server, "map", {})
        for part in list(sockets.values()):
            if part.accepting:
                waitress.wasyncore.dispatcher.close(part)

    def _wait(self, number: int) -> None:
        end = time.monotonic() + self._patience_s
        while self._router.gate.inside and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.1)  # for the last bytes
        signal.pthread_kill(cast(int, self._main.ident), number)


def allow_many_files() -> None:
    """As many open files as the system lets us have: each stream takes two sockets."""
    with suppress(ImportError, OSError, ValueError):  # not on Windows
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# =============================================================================
# 38. Crash test
# =============================================================================

MANY: Final = 1_000_000
CRASH_KEY: Final = "sk-crashtest"
CRASH_WORDS: Final = tuple(f"word{number:02}" for number in range(1, 61))
CRASH_TEXT: Final = " ".join(CRASH_WORDS)
BROKEN_EVENT: Final = b'data: {"id": "x", "choices": [{"delta": {"content": \n\n'
PREFILL_REFUSED: Final = (
    "This model does not support assistant message prefill."
    " The conversation must end with a user message."
)
OVERFULL: Final = (
    "This model's maximum context length is 8192 tokens."
    " However, your messages resulted in 9631 tokens."
)
Result = Literal["pass", "partial", "safe", "fail"]
RESULTS: Final[tuple[Result, ...]] = ("pass", "partial", "safe", "fail")


@dataclass(frozen=True)
class Fault:
    """What a provider does wrong at its first `times` requests, or for its first `until_s`.

    Words count from the first word of an answer, seconds are those of the full profile.
    """

    status: int = 0  # refuses with it; 0 = not that way
    text: str = ""
    code: str = ""
    retry_after: str = ""
    times: int = MANY
    until_s: float = math.inf
    reset: bool = False  # the connection, before the status line
    silent_s: float = 0.0  # before it closes the connection without an answer
    first_s: float = 0.0  # between the headers and the first word
    stop_at: int = MANY  # words after which it closes the connection ...
    stall_s: float = 0.0  # ... having been silent for so long
    broken_at: int = MANY  # words after which an event is no JSON
    unended: bool = False  # the stream's closing mark is missing


@dataclass(frozen=True)
class Scenario:
    """One row of the crash test: a fault of the first provider, and what good conduct is.

    `tries` bounds the requests to that provider for one of the client's: more are a failure,
    fewer only a remark. `most_s` is how long one answer may take, twice that when it is not
    streamed.
    """

    number: int
    title: str
    fault: Fault
    advice: str  # what a user may change; {c.member} stands for a setting's value
    most_s: float = 45.0
    tries: tuple[int, int] = (0, 6)
    gap_s: float = 0.0  # less between the first two tries earns a remark
    moves_on: bool = False  # not asking the second provider earns a remark
    whole: bool = True  # asked without streaming too
    refusal: bool = False  # the provider's own error is the right answer
    refuses_prefill: bool = False  # what the second provider does
    requests: int = 1
    every_s: float = 0.0  # between them


ANOTHER_PROVIDER: Final = "configure a second provider of another company"
OUTAGE_S: Final = 60.0
RECOVERY_S: Final = 30.0  # after an outage, until the provider must be in use again
# After Failover Bench v0.1 (2026-09): the same faults, times and rules of conduct.
SCENARIOS: Final = (
    Scenario(
        1, "429 with Retry-After",
        Fault(429, "Rate limit reached.", "rate_limit_exceeded", "2", times=1),
        "add a second key (<PROVIDER>_API_KEYS=key1,key2) or provider", 20.0, (2, 3), gap_s=1.8,
    ),
    Scenario(
        2, "429 at every request", Fault(429, "Rate limit reached.", "rate_limit_exceeded"),
        ANOTHER_PROVIDER, 40.0,
    ),
    Scenario(
        3, "500 once", Fault(500, "The server had an error.", "server_error", times=1),
        ANOTHER_PROVIDER, 20.0, (2, 6),
    ),
    Scenario(
        4, "503 at every request", Fault(503, "The engine is overloaded.", "overloaded"),
        ANOTHER_PROVIDER, 40.0,
    ),
    Scenario(
        5, "reset before headers", Fault(reset=True, times=1), ANOTHER_PROVIDER, 20.0
    ),
    Scenario(
        6, "no response for 120 s", Fault(silent_s=120.0),
        "TTFT_TIMEOUT={c.ttft_timeout:g} and TTFT_SWITCH={c.ttft_switch:g} are how long silence is"
        " borne: 60 and 12 are plenty",
        100.0, (0, 1),
    ),
    Scenario(
        7, "first token after 20 s", Fault(first_s=20.0),
        "TTFT_SWITCH={c.ttft_switch:g}: 12 asks somebody else sooner",
        60.0, moves_on=True,
    ),
    Scenario(
        8, "cut at word 40 of 60", Fault(stop_at=40),
        "leave RESCUE on and " + ANOTHER_PROVIDER + " that continues a text", 40.0,
    ),
    Scenario(
        9, "stall at word 20", Fault(stop_at=20, stall_s=30.0),
        "STREAM_IDLE_TIMEOUT={c.stream_idle_timeout:g}: less notices a stall sooner; leave"
        " RESCUE on",
    ),
    Scenario(10, "malformed chunk", Fault(broken_at=10), ANOTHER_PROVIDER, 30.0),
    Scenario(11, "no [DONE]", Fault(unended=True), ANOTHER_PROVIDER, 8.0, whole=False),
    Scenario(
        12, "context length", Fault(400, OVERFULL, OVERFLOW_CODE),
        "configure a model with a larger window", 20.0, (1, 1),
    ),
    Scenario(
        13, "content filter",
        Fault(400, "Rejected as a result of our safety system.", "content_policy_violation"),
        "leave the setting on that hands a refusal to the client", 20.0, (1, 1), refusal=True,
    ),
    Scenario(
        14, "cut, and no prefill", Fault(stop_at=40),
        "leave RESCUE on and " + ANOTHER_PROVIDER + " that continues a text", 40.0,
        whole=False, refuses_prefill=True,
    ),
    Scenario(
        15, "down for 60 s, 20 requests", Fault(503, "Overloaded.", "overloaded", until_s=OUTAGE_S),
        "BREAKER_COOLDOWN={c.breaker_cooldown:g}: less comes back sooner", 30.0,
        requests=20, every_s=4.0,
    ),
    Scenario(
        16, "accounting", Fault(503, "The engine is overloaded.", "overloaded"),
        "this is a fault of the router: please report it", 40.0,
    ),
)  # fmt: skip


class Pace:
    """How fast the clock of a crash test runs: both the faults and the router live by it.

    The router's settings stay the user's own: at speed 12 a TTFT_TIMEOUT of 60 passes in 5 s.
    """

    def __init__(self, speed: float) -> None:
        self.speed = speed
        # In real seconds: what a busy machine may add, which a fast clock would blow up.
        self.slack_s = 1.5 if speed > 1 else 1.0
        self._began = time.monotonic()
        self.building = threading.Lock()  # two apps at once crash CPython 3.11: ast is not safe

    def now(self) -> float:
        """Monotonic seconds of the test."""
        return self._began + (time.monotonic() - self._began) * self.speed

    def sleep(self, seconds: float) -> None:
        """Sleep for so many seconds of the test."""
        time.sleep(seconds / self.speed)

    def limit(self, seconds: float) -> float:
        """Real seconds after which `seconds` of the test are over, whatever the machine does."""
        return seconds / self.speed + self.slack_s


def said_before(body: Json) -> str:
    """The assistant's text that a request ends with (a prefill), "" where it ends otherwise."""
    turns = body.get("messages") or body.get("input")
    last = turns[-1] if isinstance(turns, list) and turns else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return ""
    content = last.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content if isinstance(part, dict))


def words_after(said: str, text: str) -> list[str]:
    """The words of `text` that go on after `said`, each with its blank; all where none do."""
    rest = text.removeprefix(said.rstrip())
    return re.findall(r"\s*\S+", rest if len(rest) < len(text) else text)


class Mock(socketserver.ThreadingTCPServer):
    """A provider on loopback that fails as told and says sixty words when it does not."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, dialect: str, prompt_tokens: int, fault: Fault, pace: Pace) -> None:
        super().__init__(("127.0.0.1", 0), MockTalk)
        self.dialect, self.prompt_tokens, self.pace = dialect, prompt_tokens, pace
        self.fault, self.refuses_prefill = fault, False
        self.began = pace.now()
        self.asked: list[float] = []  # when, in seconds of the test
        self.answered: list[float] = []
        self.over = threading.Event()
        loop = functools.partial(self.serve_forever, poll_interval=0.05)
        threading.Thread(target=loop, name="mock", daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def since(self) -> float:
        """Seconds of the test since this provider started."""
        return self.pace.now() - self.began

    def rest(self, seconds: float) -> None:
        self.over.wait(seconds / self.pace.speed)

    def next_fault(self) -> Fault:
        """What is wrong with the request that has come now."""
        self.asked.append(self.since())
        fault = self.fault
        well = len(self.asked) > fault.times or self.since() >= fault.until_s
        return Fault() if well else fault

    def text(self, body: Json) -> str:
        """The whole answer to a request."""
        return CRASH_TEXT

    def handle_error(self, request: object, client_address: object) -> None:
        """A peer that goes away is part of the test."""

    def close(self) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


class MockTalk(http.server.BaseHTTPRequestHandler):
    """One connection to a mock provider."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Mock

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the router's log is what counts."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        fault = self.server.next_fault()
        if said_before(body) and self.server.refuses_prefill:
            fault = Fault(400, PREFILL_REFUSED, "invalid_prefill")
        if fault.status:
            self.refuse(fault)
        elif fault.reset:
            self.hang_up(reset=True)
        elif fault.silent_s:
            self.server.rest(fault.silent_s)
            self.hang_up()
        else:
            self.speak(body, fault)

    def refuse(self, fault: Fault) -> None:
        error = {"message": fault.text, "type": "mock_error", "param": None, "code": fault.code}
        body: Json = {"error": error}
        if self.server.dialect == "messages":
            body = error_event(fault.status, fault.text, fault.code)
        stated = {"Retry-After": fault.retry_after} if fault.retry_after else {}
        self.head(fault.status, {**stated, "Content-Type": "application/json"}, dump_json(body))

    def head(self, status: int, headers: Mapping[str, str], body: bytes | None) -> None:
        """The head, and a whole body; None = chunks will follow."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if body is None:
            self.send_header("Transfer-Encoding", "chunked")
        elif "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body or b"")

    def hang_up(self, reset: bool = False) -> None:
        """Close without an end; with a reset instead of a FIN if so wanted."""
        self.close_connection = True
        if reset:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            socket.socket(fileno=self.connection.detach()).close()

    def speak(self, body: Json, fault: Fault) -> None:
        words = words_after(said_before(body), self.server.text(body))
        usage = {
            "prompt_tokens": self.server.prompt_tokens,
            "completion_tokens": len(words),
            "total_tokens": self.server.prompt_tokens + len(words),
        }
        surface = CRASH_SURFACES[self.server.dialect]
        opening = Opening(secrets.token_hex(12), str(body.get("model")), int(time.time()), 0, body)
        if body.get("stream"):
            self.stream(surface.writer(opening, ""), words, usage, fault)
            return
        message = {"role": "assistant", "content": "".join(words)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        reply = {"object": "chat.completion", "choices": [choice], "usage": usage}
        self.whole(dump_json(surface.whole(reply, opening, "")), fault)

    def whole(self, payload: bytes, fault: Fault) -> None:
        """One body; what cuts, stalls or spoils a stream does so to it."""
        self.server.rest(fault.first_s)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(payload))}
        if fault.broken_at < MANY:
            payload = payload[:-8] + b'"oops"  '
        if fault.stop_at < MANY:
            self.head(200, headers, payload[: len(payload) * 2 // 3])
            self.server.rest(fault.stall_s)
            self.hang_up()
            return
        self.head(200, headers, payload)
        self.server.answered.append(self.server.since())

    def stream(self, writer: Writer, words: Sequence[str], usage: Json, fault: Fault) -> None:
        self.head(200, {"Content-Type": "text/event-stream"}, None)
        self.server.rest(fault.first_s)
        self.chunk(writer.feed(crash_chunk({"role": "assistant", "content": ""})))
        for place, word in enumerate(words):
            if place == fault.stop_at:
                self.server.rest(fault.stall_s)
                self.hang_up()
                return
            if place == fault.broken_at:
                self.chunk(BROKEN_EVENT)
            self.chunk(writer.feed(crash_chunk({"content": word})))
            self.server.rest(0.015)
        end = writer.feed({**crash_chunk({}, "stop"), "usage": usage}) + writer.finish()
        # Responses have no mark of their own after the event that ends them.
        if fault.unended and self.server.dialect != "responses":
            end = b"".join(split_events(end)[:-1])
        self.chunk(end)
        self.chunk(b"", last=True)
        self.server.answered.append(self.server.since())

    def chunk(self, data: bytes, last: bool = False) -> None:
        if data or last:
            self.wfile.write(b"%X\r\n%b\r\n" % (len(data), data))


CRASH_SURFACES: Final = {
    "chat": CHAT,
    "messages": MESSAGES,
    "responses": responses_surface(codex=False, earlier=()),
}


def crash_chunk(delta: Json, finish: str | None = None) -> Json:
    """A canonical chunk."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"object": "chat.completion.chunk", "choices": [choice]}


# -- what a client sees ----------------------------------------------------------------


@dataclass
class Seen:
    """One answer as a client got it."""

    text: str = ""
    finish: str = ""  # how the answer says it ended
    ended: bool = False  # the dialect's own end has come
    error: str = ""  # what an error in the dialect's form says
    wrong: str = ""  # what no client should see
    model: str = ""  # who answered, by the router's own header
    seconds: float = 0.0  # real ones


def hear_chat(event: Json, seen: Seen) -> None:
    for choice in event.get("choices") or ():
        part = choice.get("delta") or choice.get("message") or {}
        seen.text += part.get("content") or ""
        seen.finish = choice.get("finish_reason") or seen.finish
    seen.ended = event.get("object") == "chat.completion"  # of a stream: [DONE]


def hear_messages(event: Json, seen: Seen) -> None:
    blocks = event.get("content") or ()  # of a whole answer
    seen.text += "".join(block.get("text") or "" for block in blocks)
    delta = event.get("delta") or {}
    seen.text += delta.get("text") or ""
    seen.finish = delta.get("stop_reason") or event.get("stop_reason") or seen.finish
    seen.ended = event.get("type") in ("message", "message_stop")


def hear_responses(event: Json, seen: Seen) -> None:
    kind = event.get("type")
    if kind == "response.output_text.delta":
        seen.text += event["delta"]
    whole = event if event.get("object") == "response" else event.get("response") or {}
    if kind in (None, "response.completed", "response.incomplete", "response.failed"):
        seen.finish, seen.ended = whole.get("status") or "", True
    if kind == "response.failed":
        seen.error = str((whole.get("error") or {}).get("message") or "no reason")
    if kind is None:
        items = (part for item in whole["output"] for part in item.get("content") or ())
        seen.text += "".join(part.get("text") or "" for part in items)


class Spoken(NamedTuple):
    """How a client asks in one dialect and hears the answer."""

    path: str
    asks: Callable[[str], Json]  # a question -> what a request must hold
    hear: Callable[[Json, Seen], None]
    finish: str  # of an answer that is whole


def one_turn(question: str) -> list[Json]:
    return [{"role": "user", "content": question}]


CRASH_CLIENTS: Final = {
    "chat": Spoken(
        "/v1/chat/completions",
        lambda question: {"messages": one_turn(question)},
        hear_chat,
        "stop",
    ),
    "messages": Spoken(
        "/v1/messages",
        lambda question: {"messages": one_turn(question), "max_tokens": 1000},
        hear_messages,
        "end_turn",
    ),
    "responses": Spoken(
        "/v1/responses",
        lambda question: {"input": question, "store": False},
        hear_responses,
        "completed",
    ),
}


def hear(event: bytes, client: str, seen: Seen) -> None:
    """One event of a stream, or a whole answer, as this client's SDK would take it."""
    if event == b"[DONE]":
        seen.ended = True
        return
    value = read_json(event)
    if not isinstance(value, dict):
        seen.wrong = "the client got something that is no JSON"
        return
    error = value.get("error")
    if isinstance(error, dict) and (client != "responses" or value.get("object") is None):
        seen.error = str(error.get("message") or "no reason")
        return
    CRASH_CLIENTS[client].hear(value, seen)


def ask_as(
    client: str,
    url: str,
    model: str,
    stream: bool,
    limit_s: float,
    question: str = "Say sixty words, please.",
) -> Seen:
    """Ask as a client of this dialect and take the answer apart; at most `limit_s` real seconds."""
    seen, began = Seen(), time.monotonic()
    spoken = CRASH_CLIENTS[client]
    body = {**spoken.asks(question), "model": model, "stream": stream}
    session = requests.Session()
    session.trust_env = False
    headers = {"Authorization": f"Bearer {CRASH_KEY}"}
    try:
        with session.post(
            url + spoken.path, json=body, headers=headers, stream=True, timeout=limit_s
        ) as answer:
            seen.model = answer.headers.get("X-Hermes-Model", "")
            listen(answer, client, seen, began + limit_s)
    except requests.Timeout:
        seen.wrong = "no end in sight"
    except requests.RequestException as error:
        # A stream that says what went wrong may end however it likes.
        seen.wrong = "" if seen.error else f"the connection broke: {type(error).__name__}"
    seen.seconds = time.monotonic() - began
    return seen


def listen(answer: requests.Response, client: str, seen: Seen, until: float) -> None:
    if answer.status_code != 200 or "event-stream" not in answer.headers.get("Content-Type", ""):
        hear(answer.content, client, seen)
        if answer.status_code != 200 and not seen.error:
            seen.wrong = f"status {answer.status_code} without an error that {client} clients read"
        elif answer.status_code == 500:
            seen.wrong = f"a failure of the router itself: {seen.error}"
        return
    cutter = EventCutter()
    for data in answer.iter_content(None):
        for event in split_events(cutter.feed(data)):
            if event_data(event):
                hear(event_data(event), client, seen)
        if time.monotonic() > until:
            seen.wrong = "no end in sight"
            return


# -- one run ---------------------------------------------------------------------------


@dataclass
class Run:
    """One scenario for one client, and what came of it."""

    scenario: Scenario
    client: str
    stream: bool
    primary: Mock
    fallback: Mock
    seen: list[Seen] = field(default_factory=list)
    asked: tuple[tuple[float, ...], int] = ((), 0)  # when the first provider, how often the second
    found: str = ""  # what was wrong beside the answers
    result: Result = "fail"
    why: str = ""

    @property
    def way(self) -> str:
        return f"{self.client} {'stream' if self.stream else 'whole'}"

    def grade(self) -> None:
        """Write the result down. The rule:

        fail     a hang, a truncated or wrong answer that is called whole, an end without a
                 finish or an error, a provider pestered, a router that is ill afterwards
        safe     only an honest error, in the client's dialect and in time
        partial  the beginning of the answer and then an honest error; or the whole answer, but
                 in a way that earns a remark
        pass     the whole answer; in scenario 13 the provider's own refusal
        """
        flaws = [self.found, *map(self.flaw, self.seen), self.pestered()]
        if flaw := next(filter(None, flaws), ""):
            self.result, self.why = "fail", flaw
            return
        worst = min(map(self.rank, self.seen), key=lambda row: -RESULTS.index(row[0]))
        self.result, self.why = worst
        if self.result == "pass" and (remark := self.remark()):
            self.result, self.why = "partial", remark

    def flaw(self, seen: Seen) -> str:
        """What must not happen in any answer."""
        if seen.wrong:
            return seen.wrong
        if seen.error:
            if not CRASH_TEXT.startswith(seen.text):
                return "text was shown that nobody said"
            masked_by = "prefill" in seen.error.lower()
            return "the refused prefill hides what went wrong" if masked_by else ""
        if not seen.ended or not seen.finish:
            return "the answer just ends, without a finish or an error"
        if seen.text != CRASH_TEXT or seen.finish != CRASH_CLIENTS[self.client].finish:
            count = len(seen.text.split())
            return f"{count} words, of which not all are right, are called a whole answer"
        return ""

    def rank(self, seen: Seen) -> tuple[Result, str]:
        """The result of one sound answer."""
        if not seen.error:
            around = "the refusal was routed around"
            return ("partial", around) if self.scenario.refusal else ("pass", "")
        if self.scenario.refusal:
            told = "safety system" in seen.error
            return ("pass", "") if told else ("partial", "the provider's reason is not told")
        return ("partial" if seen.text else "safe"), f"an honest error: {seen.error[:100]}"

    def pestered(self) -> str:
        """Too many requests to a provider that fails."""
        asked, requests = self.asked[0], self.scenario.requests
        if len(asked) > self.scenario.tries[1] * requests:
            return f"the first provider was asked {len(asked)} times for {requests} requests"
        soon = sum(at < asked[0] + 3.0 for at in asked)
        return f"{soon} requests within 3 s" if soon > 4 and requests == 1 else ""

    def remark(self) -> str:
        """What could be better about a whole answer."""
        (asked, second), scenario = self.asked, self.scenario
        if len(asked) < scenario.tries[0]:
            return "answered by the second provider without a second try at the first"
        if scenario.gap_s and asked[1] - asked[0] < scenario.gap_s:
            return f"asked again after {asked[1] - asked[0]:.1f} s where 2 s were stated"
        if scenario.moves_on and self.stream and not second:
            return "the client waited 20 s for the first word"
        return ""

    def advice(self, config: Config) -> str:
        """What a user may change about a result that is not a pass."""
        if self.result == "pass":
            return ""
        if self.result == "partial" and self.scenario.tries[0] > 1:
            return "nothing has to change, the answer was whole"
        if config.strict_model:
            return "STRICT_MODEL=1 keeps requests that name a model from moving on: unset it"
        return "try: " + self.scenario.advice.format(c=config)

    def told(self, config: Config) -> Json:
        """This run as a row of the JSON output."""
        return {
            "number": self.scenario.number,
            "title": self.scenario.title,
            "client": self.client,
            "stream": self.stream,
            "providers": [self.primary.dialect, self.fallback.dialect],
            "result": self.result,
            "why": self.why,
            "advice": self.advice(config),
            "asked": [len(self.asked[0]), self.asked[1]],
            "slowest_s": round(max((s.seconds for s in self.seen), default=0.0), 2),
        }


# The rows that stand in for the two providers, and a model of each dialect that takes a prefill.
CRASH_ROWS: Final = ("groq", "mistral")
CRASH_MODELS: Final = {
    "chat": ("crash-primary", "crash-fallback"),
    "messages": ("claude-haiku-4-5", "claude-sonnet-4-5"),
    "responses": ("crash-primary", "crash-fallback"),
}


def crash_config(config: Config, mocks: Sequence[Mock], home: str) -> Config:
    """The user's settings before two mock providers, far from the user's files."""
    services = []
    for place, (name, mock) in enumerate(zip(CRASH_ROWS, mocks, strict=True)):
        row = provider_named(name)
        assert row is not None, name
        row = replace(row, url=mock.url, dialects=(mock.dialect,), skip_tokens_over=0)
        model = CRASH_MODELS[mock.dialect][place]
        services.append(Service(row, mock.url, (f"crash-key-{place}",), ("mock",), (model,)))
    return replace(
        config,
        host="127.0.0.1",
        port=0,
        proxy_keys=(CRASH_KEY,),
        key_rows={},
        accounts=(),
        services=tuple(services),
        home=Path(home),
    )


@contextmanager
def crash_router(config: Config, pace: Pace) -> Iterator[tuple[str, Router]]:
    """A second router that lives by the test's clock; gives its address and itself."""
    with pace.building:
        app = create_app(config, now=pace.now, sleep=pace.sleep)
    server = make_server(app, config)
    thread = threading.Thread(target=server.run, name="crash-router", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.effective_port}", app.extensions["router"]
    finally:
        server.trigger.pull_trigger(server.close)  # in its own thread
        thread.join(10)
        app.extensions["router"].close()


class CrashJob(NamedTuple):
    scenario: Scenario
    client: str
    stream: bool
    dialects: tuple[str, str]  # of the two providers


def crash_run(job: CrashJob, config: Config, pace: Pace) -> Run:
    """Run one scenario for one client."""
    primary = Mock(job.dialects[0], 7, job.scenario.fault, pace)
    fallback = Mock(job.dialects[1], 11, Fault(), pace)
    fallback.refuses_prefill = job.scenario.refuses_prefill
    run = Run(job.scenario, job.client, job.stream, primary, fallback)
    try:
        with tempfile.TemporaryDirectory() as home:
            own = crash_config(config, (primary, fallback), home)
            with crash_router(own, pace) as (url, router):
                ask_all(run, url, own, pace)
                run.asked = tuple(primary.asked), len(fallback.asked)
                run.found = look_around(run, url, own, router)
    finally:
        primary.close()
        fallback.close()
    run.grade()
    return run


def ask_all(run: Run, url: str, config: Config, pace: Pace) -> None:
    """The requests of one scenario, one after the other."""
    scenario, began = run.scenario, time.monotonic()
    limit = pace.limit(scenario.most_s * (1 if run.stream else 2))
    model = config.services[0].models[0]
    for turn in range(scenario.requests):
        due = began + turn * scenario.every_s / pace.speed
        time.sleep(max(0.0, due - time.monotonic()))
        run.seen.append(ask_as(run.client, url, model, run.stream, limit))


def look_around(run: Run, url: str, config: Config, router: Router) -> str:
    """What is wrong after the requests: use of the providers, accounts, health."""
    if run.scenario.number == 16 and (problem := wrong_accounts(run, config, router)):
        return problem
    if run.scenario.number == 15:
        back = min(run.primary.answered, default=math.inf)
        late = RECOVERY_S + run.primary.pace.slack_s * run.primary.pace.speed
        if back > OUTAGE_S + late:
            return f"the first provider was not used again within {RECOVERY_S:g} s of recovering"
    model = config.services[1].models[0]
    tries = (ask_as(run.client, url, model, run.stream, 10.0).text for _ in range(3))
    return "" if CRASH_TEXT in tries else "requests right after it were not answered"


def wrong_accounts(run: Run, config: Config, router: Router) -> str:
    """The usage of a request that moved on: once, and with the one who answered."""
    failed, served = (service.name for service in config.services)
    until = time.monotonic() + 5.0
    # It is settled when the server closes the stream, a moment after its last byte.
    while not router.usage.tally(served).completion_tokens and time.monotonic() < until:
        time.sleep(0.01)
    tally, none = router.usage.tally(served), router.usage.tally(failed)
    if (tally.prompt_tokens, tally.completion_tokens) != (11, 60):
        return f"counted {tally.prompt_tokens} + {tally.completion_tokens} tokens, not 11 + 60"
    if none.prompt_tokens or none.completion_tokens or none.answered:
        return "the provider that failed was credited"
    named = run.seen[0].model
    return "" if named == config.services[1].models[0] else f"the answer names {named!r}"


# Client -> dialects of the first and the second provider: its own first, then a foreign one.
CRASH_PAIRS: Final = {
    "chat": ("chat", "messages"),
    "messages": ("messages", "chat"),
    "responses": ("responses", "chat"),
}
FAST: Final = 12.0  # times as fast
CRASH_WORKERS: Final = 12


def crash_test(
    config: Config,
    speed: float = FAST,
    only: Sequence[int] = (),
    pairs: Mapping[str, tuple[str, str]] = CRASH_PAIRS,
) -> list[Run]:
    """Every scenario for every client, streamed and whole; some at the same time."""
    from concurrent.futures import ThreadPoolExecutor  # 5 ms that no other command needs

    pace = Pace(speed)
    jobs = [
        CrashJob(scenario, client, stream, dialects)
        for scenario in SCENARIOS
        if not only or scenario.number in only
        for client, dialects in pairs.items()
        for stream in (True, False)
        if stream or scenario.whole
    ]
    # The long ones first, so that none of them is left over at the end.
    jobs.sort(key=lambda job: -job.scenario.requests * job.scenario.every_s - job.scenario.most_s)
    workers = CRASH_WORKERS if speed > 1 else len(jobs)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        runs = list(pool.map(lambda job: crash_run(job, config, pace), jobs))
    return sorted(runs, key=lambda run: (run.scenario.number, run.client, not run.stream))


def crash_table(runs: Sequence[Run], config: Config) -> str:
    """The results as columns for people, and a line about what is not a pass."""
    ways = list(dict.fromkeys(run.way for run in runs))
    lines = ["  ".join(["   " + "SCENARIO".ljust(28), *map(str.upper, ways)])]
    for scenario in dict.fromkeys(run.scenario for run in runs):
        of_it: dict[str, str] = {r.way: r.result for r in runs if r.scenario is scenario}
        cells = [of_it.get(way, "-").ljust(len(way)) for way in ways]
        lines.append("  ".join([f"{scenario.number:2} {scenario.title:28}", *cells]).rstrip())
    counts = Counter(run.result for run in runs)
    total = ", ".join(f"{counts[result]} {result}" for result in RESULTS)
    return "\n".join([*lines, *crash_notes(runs, config), f"{len(runs)} runs: {total}"])


def crash_notes(runs: Sequence[Run], config: Config) -> list[str]:
    """One line for each thing that is not a pass: where, what, and what a user may change."""
    found: dict[tuple[int, str], list[str]] = {}
    for run in runs:
        if run.result != "pass":
            text = f"{run.result}, {run.why}; {run.advice(config)}"
            found.setdefault((run.scenario.number, text), []).append(run.way)
    return [f"! {number} {', '.join(ways)}: {text}" for (number, text), ways in found.items()]


# =============================================================================
# 39. Documents
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
# 40. Command line
# =============================================================================

DONE_OK, FAILED, USAGE, NOT_RUNNING = 0, 1, 2, 3
LOG_FORMAT: Final = "%(asctime)s [%(levelname)s] %(message)s"


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
    close_log = log_to_file(config)
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
    router: Router = app.extensions["router"]
    threading.stack_size(4 << 20)  # Python 3.13 dies on deep JSON in a smaller one (musl, Windows)
    allow_many_files()
    drain = Drain(router, server, config.drain_timeout)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, drain.on_signal)
    try:
        router.start()
        tell_start(config, router, getattr(server, "effective_port", config.port))
        server.run()
    finally:
        server.close()
        router.close()
        close_log()
    return DONE_OK


def start_logging(config: Config) -> None:
    logging.basicConfig(format=LOG_FORMAT, level=config.log_level)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)


class PrivateLog(logging.handlers.TimedRotatingFileHandler):
    """A log file that only its owner reads; a new one each day, seven kept."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        super().__init__(path, when="midnight", backupCount=7, encoding="utf-8", utc=True)

    def _open(self) -> Any:
        def private(path: str, flags: int) -> int:
            return os.open(path, flags, stat.S_IRUSR | stat.S_IWUSR)

        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=private)


def log_to_file(config: Config) -> Callable[[], None]:
    """Everything that is logged goes to LOG_PATH as well, with a line per request.

    A thread writes, so that no request waits for the disk; what is returned ends it. A file that
    cannot be used is a warning.
    """
    if not config.log_path:
        return lambda: None
    try:
        file = PrivateLog(config.home / Path(config.log_path).expanduser())
    except OSError as error:
        log.warning("LOG_PATH is not used: %s", error)
        return lambda: None
    file.setFormatter(logging.Formatter(LOG_FORMAT))
    lines: queue.Queue[Any] = queue.Queue(10_000)
    handler = Spill(lines)
    logging.getLogger().addHandler(handler)
    request_log.setLevel(logging.DEBUG)
    request_log.propagate = config.log_level == "DEBUG"
    if not request_log.propagate:
        request_log.addHandler(handler)
    listener = logging.handlers.QueueListener(lines, file)
    listener.start()

    def close() -> None:
        for logger in (logging.getLogger(), request_log):
            logger.removeHandler(handler)
        listener.stop()
        file.close()

    return close


class Spill(logging.handlers.QueueHandler):
    """Hands lines over to the thread that writes; those that a hanging disk leaves are lost."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], queue.Full):
            super().handleError(record)


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


def cmd_crashtest(args: argparse.Namespace) -> int:
    config, only = Config.from_env(), args.only or ()
    if strange := set(only) - {scenario.number for scenario in SCENARIOS}:
        say(f"there is no scenario {min(strange)}; they are 1 to {len(SCENARIOS)}")
        return USAGE
    # What the providers do wrong is expected; what the router does wrong is not.
    logging.basicConfig(format=LOG_FORMAT, level=logging.ERROR)
    began = time.monotonic()
    runs = crash_test(config, 1.0 if args.full else FAST, only)
    seconds = time.monotonic() - began
    if args.json:
        told = {
            "profile": "full" if args.full else "fast",
            "seconds": round(seconds, 1),
            "counts": dict(Counter(run.result for run in runs)),
            "runs": [run.told(config) for run in runs],
        }
        print(json.dumps(told, indent=2))
    else:
        print(crash_table(runs, config) + f", {seconds:.0f} s")
    return FAILED if any(run.result == "fail" for run in runs) else DONE_OK


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
        "crashtest",
        "see whether your settings survive failing providers",
        cmd_crashtest,
        (
            (("--full",), {"action": "store_true", "help": "at real speed: takes two minutes"}),
            (
                ("--only",),
                {"type": int, "action": "append", "metavar": "N", "help": "scenario N; repeatable"},
            ),
            (("--json",), {"action": "store_true", "help": "the results as JSON"}),
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
