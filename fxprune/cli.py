"""The ``fxprune`` command. Help answers at once: torch is imported only by what needs it."""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ._version import __version__
from .errors import FxPruneError, PlanError, RecipeError, UsageError
from .wording import as_typed

TEXT = ("--calibration", "--text", "--data")
"""What text is called by commands that calibrate, train and measure."""

POSITIONAL = {"command", "model", "directory", "directories"}

MODEL = "a hub id, a local directory, a .gguf file, or a checkpoint that fxprune wrote"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (0 done, 1 failed, 2 used wrongly)."""
    arguments = _parser().parse_args(argv)
    arguments.verbose += arguments.verbose_before
    _logging(arguments.verbose)
    try:
        return int(importlib.import_module(f".commands.{arguments.command}", __package__).run(arguments) or 0)
    except KeyboardInterrupt:
        print("fxprune: interrupted; nothing was written", file=sys.stderr)
        return 130
    except Exception as error:
        cause = _own(error)
        if cause is None or arguments.verbose > 1:
            raise
        named = isinstance(cause, RecipeError)  # as in the file
        print(f"fxprune: {cause if named else as_typed(str(cause), set(vars(arguments)) - POSITIONAL)}", file=sys.stderr)
        return 2 if isinstance(cause, UsageError | PlanError) else 1


def _own(error: BaseException | None) -> FxPruneError | None:
    """Our error, also from under the bare ``Exception`` that torch's PassManager raises."""
    while error is not None:
        if isinstance(error, FxPruneError):
            return error
        error = error.__cause__
    return None


def _logging(verbose: int) -> None:
    """What fxprune logs goes to standard error as it is; other libraries have handlers of their own."""
    log, handler, said = logging.getLogger("fxprune"), logging.StreamHandler(), set[str]()

    def once(record: logging.LogRecord) -> bool:
        """False for what was said already: of a text, say, that two models read."""
        message = record.getMessage()
        repeated = message in said
        said.add(message)
        return not repeated

    handler.addFilter(once)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO if verbose else logging.WARNING)


def kinds(text: str) -> list[str] | dict[str, float]:
    """``a,b`` as a list, ``a=0.5,b=1`` as a mapping."""
    return _mapping(text) if "=" in text else [item.strip() for item in text.split(",") if item.strip()]


def ratio(text: str) -> float:
    """``0.2`` as a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no share: write 0.2 for 20 %") from None


def shares(text: str) -> float | dict[str, float]:
    """``0.3`` as a number, ``a=0.5,b=1`` as a mapping."""
    if "=" in text:
        return _mapping(text)
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number nor of the form kind=number,kind=number") from None


def multiples(text: str) -> int | dict[str, int]:
    """``64`` as a number, ``kv_heads=2,ffn=64`` as a mapping."""
    try:
        return {k.strip(): int(v) for k, v in (item.split("=") for item in text.split(","))} if "=" in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a whole number nor of the form kind=number,kind=number") from None


def numbers(text: str) -> list[float]:
    """``0.8,0.2`` as a list."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form number,number") from None


def named(text: str) -> dict[str, str]:
    """``a=FILE,b=FILE`` as a mapping."""
    parts = [item.partition("=") for item in text.split(",")]
    found = {name.strip(): file.strip() for name, _, file in parts}
    if len(found) < len(parts) or not all([*found, *found.values()]):
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form name=FILE,name=FILE with a different name for each")
    return found


def _mapping(text: str) -> dict[str, float]:
    try:
        parts = [(k.strip(), float(v)) for k, v in (item.split("=") for item in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form kind=number,kind=number") from None
    names = [name for name, _ in parts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise argparse.ArgumentTypeError(f"'{text}' names {twice[0]} twice")
    return dict(parts)


class _Parser(argparse.ArgumentParser):
    """Refuses what it does not know in a line: with the command's own name, and the nearest option that it has."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and know everything or fail."""
        given = sys.argv[1:] if args is None else args
        self._refuse_twice(given)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = re.findall(r"--[a-z][a-z-]*", self.format_help())
            typed = unknown[0].partition("=")[0]
            close = [name for name in TEXT if typed in TEXT and name in options] or difflib.get_close_matches(typed, options, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            if "--set" in given and re.match(r"\w+=", unknown[0]):
                hint = f"; --set takes one FIELD=VALUE: write '--set {unknown[0]}'"
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown

    def _refuse_twice(self, typed: Sequence[str]) -> None:
        """Of an option that takes one value the last one would count, and nobody would be told."""
        seen: set[str] = set()
        for word in typed:
            action = self._option_string_actions.get(word.partition("=")[0])
            if isinstance(action, argparse._StoreAction):
                if action.dest in seen:
                    self.error(
                        f"argument {'/'.join(action.option_strings)}: given twice; it takes one value, see --help for several"
                    )
                seen.add(action.dest)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and where the options stand, rather than all of them."""
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help shows what it takes\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fxprune", description="Make transformers smaller by removing structure, exactly.")
    parser.add_argument("--version", action="version", version=f"fxprune {__version__}")
    parser.add_argument("-v", "--verbose", dest="verbose_before", action="count", default=0, help="as after the command")
    common = _Parser(add_help=False)
    common.add_argument("-v", "--verbose", action="count", default=0, help="say what is done; twice for tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    loading = _Parser(add_help=False)
    loading.add_argument("model", help=MODEL)
    loading.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, float16, float64")
    loading.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
    _prune(commands.add_parser("prune", parents=[common, loading], help="prune a model and write a checkpoint"))
    _groups(commands.add_parser("groups", parents=[common, loading], help="show what can be pruned, and why the rest cannot"))
    _sensitivity(
        commands.add_parser(
            "sensitivity", parents=[common, loading], help="what each layer and group is worth, and which to leave whole"
        )
    )
    _explore(
        commands.add_parser("explore", parents=[common, loading], help="a page about groups, importance and what a plan keeps")
    )
    verify = commands.add_parser("verify", parents=[common, loading], help="check a written checkpoint against its dense model")
    verify.add_argument("--dense", required=True, metavar="MODEL", help="the dense model it was pruned from")
    verify.add_argument("--json", action="store_true", help="print JSON")
    _eval(
        commands.add_parser("eval", parents=[common, loading], help="perplexity, tasks, cost and latency, beside the dense model")
    )
    _recover(commands.add_parser("recover", parents=[common], help="train a pruned model until it knows again what it knew"))
    report = commands.add_parser("report", parents=[common], help="render a checkpoint's report and model card again from its JSON")
    report.add_argument("directory", metavar="DIR", help="a checkpoint that fxprune wrote")
    report.add_argument(
        "--base-model", metavar="ID", help="the hub id that it was made from, for the model card; kept in the JSON from then on"
    )
    against = commands.add_parser("compare", parents=[common], help="put checkpoints of one dense model side by side")
    against.add_argument("directories", metavar="DIR", nargs="+", help="checkpoints that fxprune wrote, two or more")
    against.add_argument("-o", "--output", metavar="FILE", help="write it as .html (with charts), .md or .json instead")
    _shear(
        commands.add_parser(
            "shear", parents=[common, loading], help="LoRAShear: prune a model while adapters train it, then recover it"
        )
    )
    demo = commands.add_parser("demo", parents=[common], help="prune SmolLM2-135M by 20 %% and show everything")
    demo.add_argument("-o", "--output", default="demo-output", help="directory to write (replaced if it exists)")
    demo.add_argument("--ratio", type=float, default=0.2, help="share of all parameters to remove (default 0.2)")
    return parser


def _prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", help="directory to write the checkpoint to (needed unless --dry-run)")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in the output directory")
    what = parser.add_argument_group("what to remove")
    what.add_argument("--ratio", type=ratio, help="share of all parameters, 0.2 for 20 %%")
    what.add_argument("--units", type=shares, help="instead: share of units, 0.25 or ffn=0.3,kv_heads=0.33")
    what.add_argument("--plan", help="instead: replay a plan file")
    what.add_argument("--kinds", type=kinds, help="kinds to prune, a,b or with a pace a=1,b=0.5 (kv_heads, query_groups, ffn, ...)")
    what.add_argument(
        "--ranking", help="how the budget is spread: local (every layer alike), global, standardised or measured (by the loss)"
    )
    what.add_argument("--widths", help="uniform (the same in every layer: loads everywhere) or per-layer")
    what.add_argument(
        "--stock",
        action=argparse.BooleanOptionalAction,
        help="with uniform widths: leave whole what stock classes cannot have fewer of (recipe uniform does)",
    )
    what.add_argument("--protect-first", type=int, metavar="K", help="leave the first K layers whole")
    what.add_argument("--protect-last", type=int, metavar="K", help="leave the last K layers whole")
    what.add_argument("--protect", action="append", metavar="PATTERN", help="leave groups of this name whole")
    what.add_argument(
        "--knowledge",
        metavar="FILE",
        help="what fxprune sensitivity -o FILE wrote, or a sheared checkpoint: leave what matters most whole",
    )
    what.add_argument(
        "--protect-share", type=float, metavar="SHARE", help="with --knowledge: share of the groups left whole (default 0.1)"
    )
    what.add_argument(
        "--multiple", type=multiples, metavar="N|KIND=N,...", help="round widths to multiples; one number leaves heads out"
    )
    what.add_argument("--floor", type=float, help="least share of units that a group keeps")
    how = parser.add_argument_group("how: all of these, and those above, are what the recipe says unless given")
    how.add_argument(
        "--recipe",
        help="default, uniform, llm-pruner, flap, wanda-sp, magnitude, random, channel, or a .yaml file (default: default; none "
        "beside a --criterion that reads no text)",
    )
    how.add_argument("--criterion", help="random, l1, l2, taylor_vector, taylor1, taylor2, taylor_mixed, wanda, flap, kfac")
    how.add_argument("--aggregation", help="sum, mean, max, product, last, first")
    how.add_argument("--compensation", help="what makes up for the units that go: none, bias, least-squares")
    how.add_argument(
        "--calibration", help="a .txt/.json/.jsonl file (.gz too) or a datasets name; default: the model's own samples"
    )
    how.add_argument("--layers-by", help="for kind layers: influence (measured) or first (the first ones stay)")
    how.add_argument("--samples", type=int, help="calibration samples")
    how.add_argument("--length", type=int, help="tokens of each")
    how.add_argument("--batch-size", type=int, help="calibration samples at a time")
    how.add_argument("--levels", type=int, help="for measured ranking: steps into which each group is cut")
    how.add_argument("--sensitivity-samples", type=int, help="for measured ranking: samples that the loss is measured on")
    how.add_argument("--rounds", type=int, help="for measured ranking: parts the budget is cut into")
    how.add_argument("--seed", type=int, default=0, help="of the calibration text and of random scores")
    parser.add_argument("--dry-run", action="store_true", help="show sizes and stop; nothing is measured or written")
    parser.add_argument("--json", action="store_true", help="with --dry-run: print JSON")
    parser.add_argument("--no-verify", action="store_true", help="skip the comparison with the masked dense model")


def _groups(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--meta", action="store_true", help="build the model without weights (groups need none)")
    parser.add_argument("--expand", action="store_true", help="one row for each layer")
    parser.add_argument("--prunable", action="store_true", help="only what can be pruned")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--why", nargs=2, metavar=("PARAM_A", "PARAM_B"), help="the coupling path between two parameters")
    parser.add_argument("--export", metavar="FILE", help="write the coupling graph as .graphml, .json or .dot")
    parser.add_argument(
        "--picture", metavar="FILE", help="draw a block with its groups in colour: .dot, or by Graphviz .svg, .png, .pdf"
    )
    parser.add_argument("--block", metavar="MODULE", help="with --picture: which (default: the first residual block)")


def _explore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the page, .html: one file, no server, no network")
    parser.add_argument("--meta", action="store_true", help="build the model without weights; then there is no importance")
    parser.add_argument("--plan", metavar="FILE", help="show what this plan keeps, and the importance that it recorded")
    parser.add_argument(
        "--criterion", help="importance of units (default: what the plan recorded, or l2); see fxprune prune --help"
    )
    parser.add_argument(
        "--calibration", metavar="TEXT", help="for criteria that read text: a file or a datasets name; default: the model's own"
    )
    parser.add_argument("--samples", type=int, default=32, help="calibration samples (default 32)")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default 128)")
    parser.add_argument("--batch-size", type=int, default=8, help="samples at a time (default 8)")
    parser.add_argument("--seed", type=int, default=0)


def _sensitivity(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is taken away, one at a time")
    what.add_argument("--kinds", type=kinds, help="kv_heads, query_groups, ffn, .., and layers (default kv_heads,ffn,layers)")
    what.add_argument("--share", type=float, default=1.0, help="share of a group's units (default 1: all that may go)")
    what.add_argument("--take", default="least", help="which units: the least (default) or the most important")
    what.add_argument("--criterion", default="taylor1", help="importance of units (default taylor1); see fxprune prune --help")
    how = parser.add_argument_group("how it is measured")
    how.add_argument(
        "--text", metavar="FILE", help="a .txt/.json/.jsonl file (.gz too) or a datasets name; default: the model's own"
    )
    how.add_argument("--by", default="loss", help="what ranks: the rise of the loss (default), or divergence from the dense model")
    how.add_argument("--samples", type=int, default=32, help="samples of the text (default 32)")
    how.add_argument("--length", type=int, default=128, help="tokens of each (default 128)")
    how.add_argument("--batch-size", type=int, default=8, help="samples at a time (default 8)")
    how.add_argument("--seed", type=int, default=0)
    out = parser.add_argument_group("what comes out")
    out.add_argument("--protect-share", type=float, default=0.1, metavar="SHARE", help="share to leave whole (default 0.1)")
    out.add_argument("-o", "--output", metavar="FILE", help="write it as .json, for fxprune prune --knowledge")
    out.add_argument("--plot", metavar="FILE", help="draw it over the depth: .png, .svg, .pdf (needs the extra plot)")
    out.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    out.add_argument("--resume", action="store_true", help="go on with a measurement that was cut short (OUTPUT.measuring)")
    out.add_argument("--json", action="store_true", help="print JSON")


def _recover(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="a checkpoint: of fxprune, or any other, which is trained as it is")
    parser.add_argument("-o", "--output", required=True, help="directory to write; the training state is kept in OUTPUT.recovering")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in the output directory")
    parser.add_argument("--restart", action="store_true", help="drop the training state of an interrupted run")
    parser.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, float16, float64")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
    text = parser.add_argument_group("text", "a file, a datasets name, or a mixture: a.jsonl=0.7,b.txt=0.3")
    text.add_argument("--data", required=True, help="what to train on: instructions, conversations or plain text")
    text.add_argument("--validation", help="what to measure on (default: examples held out of the data)")
    text.add_argument("--samples", help="examples read from the data, or of each source of a curriculum (default all)")
    lessons = parser.add_argument_group("curriculum", "in rounds, measured on held-out text of each source; see docs/curriculum.md")
    lessons.add_argument(
        "--curriculum",
        metavar="WEIGHTS",
        help="dynamic (each source by what was lost of it; needs --teacher) or static (the weights given)",
    )
    lessons.add_argument(
        "--then", action="append", metavar="DATA", help="what to train on after --data; may be given several times"
    )
    lessons.add_argument("--rounds", type=int, help="of each stage at most (default 4)")
    lessons.add_argument("--floor", type=float, help="least share of a source with dynamic weights (default 0.05)")
    lessons.add_argument("--patience", type=int, help="end a stage after so many rounds without a fall (default 1; 0 never)")
    lessons.add_argument("--threshold", type=float, help="what counts as a fall, in nats per token (default 0)")
    lessons.add_argument("--shares", type=numbers, metavar="A,B", help="of max_steps and max_tokens for each stage")
    lessons.add_argument("--plot", metavar="FILE", help="draw weights and degradation (needs the extra plot)")
    how = parser.add_argument_group("training", "what is not given here is as in the recipe")
    how.add_argument("--recipe", default="default", help="default, or llm-pruner (the paper's)")
    how.add_argument("--teacher", metavar="MODEL", help="the dense model, for distill_weight, hidden_weight and dynamic weights")
    how.add_argument("--method", help="lora, or full (every parameter)")
    how.add_argument("--rank", help="of the adapters")
    how.add_argument("--lr", help="peak learning rate")
    how.add_argument("--epochs", help="passes over the data")
    how.add_argument("--max-steps", help="at most so many optimizer steps")
    how.add_argument("--max-tokens", help="at most about so many tokens")
    how.add_argument("--batch-size", help="sequences of an optimizer step")
    how.add_argument("--micro-batch-size", help="sequences run at a time; fewer need less memory")
    how.add_argument("--length", help="tokens of a packed row")
    how.add_argument("--cutoff", help="tokens that an example is cut to")
    how.add_argument("--seed", help="of data order, dropout and the adapters' start")
    how.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any other field of fxprune.Recovery")


def _shear(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", required=True, help="directory to write; what is reached is kept in OUTPUT.shearing")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in the output directory")
    parser.add_argument("--restart", action="store_true", help="drop what an interrupted run left")
    what = parser.add_argument_group("what to remove")
    what.add_argument("--ratio", type=ratio, required=True, help="share of all parameters, 0.2 for 20 %%")
    what.add_argument("--kinds", type=kinds, help="kinds that may lose units (default kv_heads,ffn)")
    what.add_argument("--widths", help="per-layer (default), or uniform: stock transformers; needs --protect-share 0")
    what.add_argument("--protect-first", type=int, metavar="K", help="leave the first K layers whole")
    what.add_argument("--protect-last", type=int, metavar="K", help="leave the last K layers whole")
    what.add_argument("--protect", action="append", metavar="PATTERN", help="leave groups of this name whole")
    what.add_argument(
        "--multiple", type=multiples, metavar="N|KIND=N,...", help="round widths to multiples; one number leaves heads out"
    )
    what.add_argument("--floor", type=float, help="least share of units that a group keeps")
    what.add_argument(
        "--protect-share", type=float, metavar="SHARE", help="of the groups that matter most, left whole (default 0.1)"
    )
    what.add_argument(
        "--knowledge", metavar="FILE", help="what fxprune sensitivity -o FILE wrote, or a sheared checkpoint, instead of measuring"
    )
    text = parser.add_argument_group("text", "a file, a datasets name, or a mixture: a.jsonl=0.7,b.txt=0.3")
    text.add_argument("--data", required=True, help="what to shear on, and recovery's first stage")
    text.add_argument("--then", action="append", metavar="DATA", help="recovery's next stage; may be given several times")
    text.add_argument("--samples", help="examples read of each source (default all)")
    how = parser.add_argument_group("training", "what is not given here is as in the recipe")
    how.add_argument("--tokens", type=int, help="to train on altogether, shearing and recovery")
    how.add_argument("--steps", type=int, help="instead: optimizer steps altogether")
    how.add_argument("--recipe", help="default, lorashear (units ranked by the paper's saliency), or a .yaml file")
    how.add_argument("--shear-share", type=float, metavar="SHARE", help="of the tokens, for shearing (default 0.3; 1: no recovery)")
    how.add_argument("--periods", type=int, help="in which units go to zero (default 4)")
    how.add_argument("--one-shot", action="store_true", default=None, help="all units go at once after the warm-up (an ablation)")
    how.add_argument("--projection", help="half-space (default) or linear")
    how.add_argument(
        "--criterion", help="what ranks units: auto (default: kfac where it can), saliency (the paper's), taylor1, kfac, ..."
    )
    how.add_argument("--curriculum", metavar="WEIGHTS", help="of recovery: dynamic (default) or static")
    how.add_argument("--rounds", type=int, help="of each stage of recovery at most (default 4)")
    how.add_argument("--patience", type=int, help="end a stage after so many rounds without a fall (default 1; 0 never)")
    how.add_argument("--rank", help="of the adapters")
    how.add_argument("--lr", help="learning rate: of shearing, and the peak of recovery")
    how.add_argument("--batch-size", help="sequences of an optimizer step")
    how.add_argument("--micro-batch-size", help="sequences run at a time; fewer need less memory")
    how.add_argument("--length", help="tokens of a packed row")
    how.add_argument("--cutoff", help="tokens that an example is cut to")
    how.add_argument("--seed", help="of data order, dropout and the adapters' start")
    how.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any other setting of a shearing, or field of fxprune.Recovery",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw recovery's weights and degradation (needs the extra plot)")


def _eval(parser: argparse.ArgumentParser) -> None:
    file = "a .txt/.json/.jsonl file (.gz too) or a datasets name"
    parser.add_argument(
        "--dense",
        metavar="MODEL",
        help="measure this one in the same way and show the share that is kept; or what -o FILE.json kept of it",
    )
    text = parser.add_argument_group("perplexity")
    text.add_argument("--text", metavar="FILE", help=f"{file}; prints one line for each length")
    text.add_argument("--texts", type=named, metavar="NAME=FILE,...", help="texts by name, such as wikitext2=FILE,ptb=FILE")
    text.add_argument(
        "--length",
        type=int,
        action="append",
        help="tokens of each window (default 128, or all that the model reads); may be given several times",
    )
    text.add_argument("--stride", type=int, help="tokens between windows (default: the length, no overlap)")
    text.add_argument("--max-windows", type=int, help="stop after so many")
    text.add_argument("--protocol", help="how rows become tokens: llm-pruner (default) or stream")
    tasks = parser.add_argument_group("zero-shot tasks (needs the extra eval)")
    tasks.add_argument("--tasks", type=kinds, metavar="all|a,b", help="all seven of LLM-Pruner's tables, or some: boolq,piqa")
    tasks.add_argument("--data", metavar="DIR", help="read boolq.jsonl.gz and so on from here (default: from the hub)")
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each task")
    parser.add_argument("--batch-size", type=int, help="windows or requests at a time (default 8)")
    parser.add_argument("--latency", action="store_true", help="measure prefill and decode too, one sequence at a time")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the table (.md) or the numbers (.json) too")
    parser.add_argument(
        "--attach",
        action="store_true",
        help="keep the numbers with the model (MODEL/eval.json), beside those already there, and render its report again",
    )


if __name__ == "__main__":
    sys.exit(main())
