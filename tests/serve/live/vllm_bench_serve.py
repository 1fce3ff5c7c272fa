"""``vllm bench serve`` for vLLM's CPU build, whose ``vllm`` command does not start (its package has another name)."""

import asyncio

from vllm.benchmarks.serve import add_cli_args, main_async
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    asyncio.run(main_async(parser.parse_args()))
