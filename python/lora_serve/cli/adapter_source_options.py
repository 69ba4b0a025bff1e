"""The options that say where adapters may come from; `serve` and `adapter check` have them alike."""

from __future__ import annotations

import argparse


def add_arguments(group: argparse._ActionsContainer) -> None:
    """Add the options to a group or parser; their destinations are fields of EngineConfig."""
    group.add_argument(
        "--lora-allowed-roots",
        metavar="FOLDER",
        nargs="+",
        action="extend",
        help="folders that local adapters may be read from (default: any)",
    )
    group.add_argument(
        "--lora-allow-hub",
        action="store_true",
        help="adapter paths may be repositories of the Hugging Face hub: org/name, org/name@revision or "
        "hf://org/name",
    )
    group.add_argument(
        "--lora-resolver",
        dest="lora_resolvers",
        metavar="NAME",
        action="append",
        default=[],
        help="plug-in that brings adapters from elsewhere, such as s3://bucket/sql; repeat it for several, "
        "which are asked in this order",
    )
