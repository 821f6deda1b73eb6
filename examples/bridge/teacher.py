"""Serves a Hugging Face checkpoint as the teacher.

    torchrun --nproc-per-node 2 examples/bridge/teacher.py --hf FOLDER --tp 2 --vcrd-address host:port

Megatron-Bridge converts it to a Megatron model with --tp tensor ranks and --pp pipeline stages. Further processes are
replicas. Without a GPU it runs on CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

# For a script, Python searches the folder of the script first, not the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.bridge import models  # noqa: E402


def main() -> None:
    """Builds this rank's part of the teacher, and serves it until every student has left."""
    parser = models.parser_of(__doc__)
    parser.add_argument("--hf", required=True, help="folder or name of the teacher's Hugging Face checkpoint")
    parser.add_argument(
        "--vcrd-stay",
        action="store_true",
        help="serve one student job after another, until none has come for --vcrd-connect-timeout seconds",
    )
    args = parser.parse_args()
    models.start()
    import torch

    from vcrd.megatron import serve

    try:
        bridge = models.bridge_of(args.hf)
        provider = models.provider_of(bridge, args)
        settings = models.settings_of(args, bridge.hf_pretrained.config)
    except ValueError as error:
        models.refuse(error)
    models.init_process_group()
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    chunks = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=models.ON_CPU)
    served = serve(
        chunks, settings, stay=args.vcrd_stay, tokenizer=models.tokenizer_of(args.hf), checkpoint=args.hf
    )
    if torch.distributed.get_rank() == 0:
        print(f"served {served} micro-batches", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
