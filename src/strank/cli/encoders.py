"""``strank encoders``: what images can be embedded by."""

from __future__ import annotations

from strank.cli.console import Json, finish, show_table

__all__ = ["encoders"]


def encoders(as_json: Json = False) -> None:
    """List the encoders that `strank embed --encoder` knows by name.

    Besides, it takes any network of timm (timm:NAME) or transformers (hf:OWNER/NAME), a folder with
    one, and what a module of yours gives (module:callable). Weights come from the hub, or with
    --weights from a file. --json has the file, revision, colours, precision and citation, too.

    [bold]Example:[/] strank encoders
    """
    import pandas as pd

    from strank.encoders.catalogue import encoder_table

    rows = encoder_table()
    if not as_json:
        shown = pd.DataFrame(rows).rename(columns={"um_per_pixel": "µm/px", "pixels": "input"})
        shown["gated"] = shown["gated"].map({True: "yes", False: "no"})
        names = ["name", "width", "µm/px", "input", "licence", "gated", "source"]
        show_table(shown[names], "Encoders")
    finish(
        {"encoders": rows},
        as_json=as_json,
        lines=["Gated: accept the terms at https://huggingface.co/SOURCE, then `hf auth login`."],
    )
