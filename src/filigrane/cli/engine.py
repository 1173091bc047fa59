"""filigrane engine: the commands of the group, each in a file of its own."""

from typing import Final

from filigrane.cli.engine_check import check
from filigrane.cli.engine_enrol import enrol
from filigrane.cli.engine_lease import lease
from filigrane.cli.engine_probe import probe
from filigrane.cli.engine_serve import serve
from filigrane.cli.engine_token import token
from filigrane.cli.engine_triton import triton_repository
from filigrane.cli.engine_vllm_config import vllm_config

SUBCOMMANDS: Final = {
    "check": check,
    "enrol": enrol,
    "lease": lease,
    "probe": probe,
    "token": token,
    "serve": serve,
    "triton-repository": triton_repository,
    "vllm-config": vllm_config,
}
