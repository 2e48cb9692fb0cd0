"""vLLM's INT8 MoE layers on ``quarkconv.kernels``: a plugin that ``QUARKCONV_VLLM=1`` turns on.

    QUARKCONV_VLLM=1 vllm serve CHECKPOINT

vLLM calls ``register`` in each of its processes (entry point ``vllm.general_plugins``). The extension points in use:

- ``register_quantization_config`` replaces the configs "quark" and "compressed-tensors" with subclasses (``configs``),
  whose method of an INT8 W8A8 MoE layer is ours (``method``);
- ``FusedMoEExpertsModular`` is the interface of the experts (``experts``).

vLLM's table of INT8 backends (``fused_moe/oracle/int8.py``) has no registration in 0.26 to 0.33: vLLM chooses and logs
its own backend first, and the plugin logs that it replaces it. Layers keep vLLM's parameters, names and layouts.
This module imports vLLM only when the plugin is on.
"""

from __future__ import annotations

import os
from typing import Final

VARIABLE: Final = "QUARKCONV_VLLM"
FIRST: Final = (0, 26)
LAST: Final = (0, 33)
"""The minor releases of vLLM that tests/engines/vllm/test_plugin*.py ran with; docs/vllm.md has its exceptions."""


def register() -> None:
    """Turn the plugin on in this process, if the environment says so and vLLM is of a tested release.

    May be called repeatedly. On another release, or where a module is missing, it logs one line and changes nothing.
    """
    if os.environ.get(VARIABLE) != "1":
        return
    import vllm
    from vllm.logger import init_logger

    logger = init_logger("vllm.quarkconv")
    if not is_tested(vllm.__version__):
        reason = "the plugin supports vLLM {}.{} to {}.{}".format(*FIRST, *LAST)
        logger.warning_once("quarkconv: %s=1 has no effect: %s, found %s", VARIABLE, reason, vllm.__version__)
        return
    try:
        from quarkconv.integrations.vllm.configs import register_configs
    except ImportError as error:
        logger.warning_once("quarkconv: %s=1 has no effect: %s", VARIABLE, str(error))
        return
    register_configs()


def is_tested(version: str) -> bool:
    """Whether a version of vLLM, such as "0.33.0" or "0.33.1rc2+cu130", is of a tested minor release."""
    numbers = version.split(".")[:2]
    return len(numbers) == 2 and all(n.isdigit() for n in numbers) and FIRST <= tuple(map(int, numbers)) <= LAST
