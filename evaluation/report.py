"""results.json, predictions and training logs -> one self-contained HTML page: what supervision did, where it fails.

Everything that comes from data passes through `_e`; the page's policy forbids every request, so it opens offline.
"""

import base64
import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swim.evaluation import alignment
from swim.evaluation.alignment import METRICS, noun_metrics
from swim.evaluation.answers import is_correct
from swim.evaluation.figures import curves_png, strip_png
from swim.evaluation.predictions import Noun, Prediction, clip_of, read_predictions

FramesFor = Callable[[str, list[int]], np.ndarray]
MaskFor = Callable[[str, str, int], np.ndarray | None]

NAMES = {
    "accuracy": "answer accuracy",
    "pointing": "pointing",
    "mass": "attention mass",
    "ap": "AP",
    "auc": "ROC-AUC",
    "nss": "NSS",
    "precision": "precision at 0.75",
    "gamepoint_1": "GamePoint@1 %",
    "gamepoint_5": "GamePoint@5 %",
    "gamepoint_10": "GamePoint@10 %",
    "mass_px": "attention mass, pixels",
    "prevalence": "prevalence",
    "prevalence_px": "prevalence, pixels",
}
COSTS = {"seconds": "training time, s", "peak_memory_mib": "peak memory, MiB"}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --text: #1d1f21; --soft: #6b6f74; --line: #e1e3e6; --ground: #fff; --card: #f7f7f8;
  --good: #16734a; --bad: #b3372f; }}
@media (prefers-color-scheme: dark) {{ :root {{ --text: #e4e5e7; --soft: #979ba1; --line: #33363b; --ground: #141517;
  --card: #1c1e21; --good: #5cc592; --bad: #f0877d; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 44px 32px 88px; max-width: 1176px; background: var(--ground); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }}
h1 {{ font-size: 27px; line-height: 1.25; font-weight: 650; margin: 0 0 14px; letter-spacing: -.01em; }}
h2 {{ font-size: 19px; font-weight: 650; margin: 52px 0 8px; }}
h3 {{ font-size: 15px; font-weight: 600; margin: 26px 0 6px; }}
.card h3 {{ margin-top: 0; }}
p {{ max-width: 78ch; margin: 6px 0; }}
.lead {{ font-size: 18.5px; line-height: 1.5; max-width: 72ch; }}
.soft, small, caption {{ color: var(--soft); }}
small {{ font-size: 12px; font-weight: 400; display: block; line-height: 1.35; white-space: nowrap; }}
table {{ border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; margin: 10px 0; }}
table.wide {{ width: 100%; }}
caption {{ caption-side: bottom; text-align: left; padding-top: 9px; font-size: 13px; }}
th, td {{ padding: 7px 20px 7px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }}
thead th {{ color: var(--soft); font-weight: 500; font-size: 13px; vertical-align: bottom; }}
tbody th {{ font-weight: 500; }}
td.key {{ font-weight: 650; }}
td {{ overflow-wrap: anywhere; }}
td table {{ margin: -7px 0 -8px; }}
.row {{ display: flex; flex-wrap: wrap; gap: 0 72px; align-items: flex-start; }}
.scroll {{ max-height: 300px; overflow: auto; }}
.card {{ background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 15px 18px;
  margin: 14px 0; }}
.card p {{ margin: 2px 0; font-size: 15px; max-width: none; overflow-wrap: anywhere; }}
.card .who {{ display: inline-block; min-width: 96px; margin-right: 8px; color: var(--soft); }}
.card .nums {{ color: var(--soft); font-size: 13px; margin-left: 12px; font-variant-numeric: tabular-nums; }}
.right {{ color: var(--good); }} .wrong {{ color: var(--bad); }}
mark {{ background: none; color: inherit; font-weight: 650; text-decoration: underline; text-decoration-thickness: 2px;
  text-underline-offset: 3px; }}
img {{ display: block; max-width: 100%; height: auto; margin-top: 12px; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }}
details {{ margin: 12px 0; }} summary {{ cursor: pointer; font-weight: 600; }}
</style></head><body>
{body}
</body></html>
"""


@dataclass(frozen=True)
class ArmFiles:
    """Files of one run: predictions.jsonl and, where present, the training log and the quarantine list (JSON lines)."""

    predictions: Path
    metrics: Path | None = None
    quarantine: Path | None = None


def write_report(
    out_html: Path,
    *,
    title: str,
    results: Mapping[str, Any],
    arms: Mapping[str, ArmFiles],
    frames_for: FramesFor,
    mask_for: MaskFor,
    num_examples: int = 6,
    num_worst: int = 3,
    max_steps: int = 8,
) -> None:
    """Writes the page for one or two arms (the first is the baseline) of a `scores.write_results` result.

    `frames_for(clip, frames)` gives uint8 [N, H, W, 3], `mask_for(clip, object_id, frame)` bool [H, W] or None; frames
    are stored-frame numbers. Raises KeyError when `results` lacks an arm.
    """
    names = list(arms)
    predictions = {name: read_predictions(files.predictions) for name, files in arms.items()}
    logs = {name: _json_lines(files.metrics) for name, files in arms.items()}
    curves = curves_png(logs)
    strips = _Strips(predictions, frames_for, mask_for, max_steps)
    parts = [
        f"<h1>{_e(title)}</h1>",
        f'<p class="lead">{_headline(results, names)}</p>',
        "<h2>Scores</h2>",
        _score_table(results, names),
        _task_table(results, names),
        "<h2>Training</h2>",
        _image(curves, "training curves") if curves else '<p class="soft">No training log was given.</p>',
        "<h2>What the nouns look at</h2>",
        '<p class="soft">The first clips of the held-out set in its order, each with the first noun of its first '
        "conversation that has one: chosen without looking at any score. One colour scale per noun for all rows, with "
        "a square-root stretch; the white contour is the annotated mask; each square of heat is one visual token.</p>",
        *(strips.card(id, index) for id, index in strips.first_nouns(num_examples)),
        f"<h2>Worst nouns of {_e(names[-1])}</h2>",
        '<p class="soft">The nouns with the lowest pointing, then the lowest attention mass, among those scored.</p>',
        *(strips.card(id, index) for id, index in strips.worst_nouns(num_worst)),
        "<h2>Coverage and failures</h2>",
        _coverage(results, names),
        *(_failures(results[name]["failures"], name) for name in names),
        *(_quarantine(_json_lines(files.quarantine), name) for name, files in arms.items()),
        "<h2>Protocol and provenance</h2>",
        "<details><summary>Definitions of the metrics</summary>",
        f"<pre>{_e(alignment.__doc__ or '')}</pre></details>",
        *(f"<details><summary>{key.capitalize()}</summary>{_tree(results[key])}</details>"
          for key in ("protocol", "provenance")),
    ]  # fmt: skip
    out_html = Path(out_html)
    out_html.parent.mkdir(parents=True, exist_ok=True)
    out_html.write_text(PAGE.format(title=_e(title), body="\n".join(parts)), encoding="utf-8")


class _Strips:
    """Picks nouns and shows each with all arms under one colour scale."""

    def __init__(
        self,
        predictions: Mapping[str, Mapping[str, Prediction]],
        frames_for: FramesFor,
        mask_for: MaskFor,
        max_steps: int,
    ) -> None:
        self.predictions, self.frames_for, self.mask_for = predictions, frames_for, mask_for
        self.max_steps = max_steps

    def first_nouns(self, num: int) -> list[tuple[str, int]]:
        """(id, noun index) of the first conversation with a noun of each of the first `num` such clips."""
        # The order of the first arm's file, which has its failures too, is the order of the held-out set. An arm's
        # failure is shown beside the other arm's map, not skipped.
        first: dict[str, str] = {}
        for id in dict.fromkeys(id for lines in self.predictions.values() for id in lines):
            if any(id in lines and lines[id].nouns for lines in self.predictions.values()):
                first.setdefault(clip_of(id), id)
        return [(id, 0) for id in first.values()][:num]

    def worst_nouns(self, num: int) -> list[tuple[str, int]]:
        """(id, noun index) of the last arm's scorable nouns with the lowest pointing, then mass."""
        ranked = []
        for id, line in list(self.predictions.values())[-1].items():
            for index, noun in enumerate(line.nouns):
                if metrics := noun_metrics(noun.map, noun.coverage):
                    ranked.append((metrics["pointing"], metrics["mass"], id, index))
        return [(id, index) for *_, id, index in sorted(ranked)[:num]]

    def card(self, id: str, index: int) -> str:
        """The conversation, each arm's answer and numbers, and the strip of frames and heat."""
        lines = {name: lines.get(id) for name, lines in self.predictions.items()}
        nouns = {name: line.nouns[index] for name, line in lines.items() if line and index < len(line.nouns)}
        name, noun = next(iter(nouns.items()))
        shown = lines[name]
        assert shown is not None
        rows = [f"<h3>{_e(id)} <span class='soft'>· {_e(shown.task)} · “{_e(noun.text)}”</span></h3>"]
        for turn, who in enumerate(("prompt", "target")):
            text = (shown.prompt, shown.target)[turn]
            rows.append(f"<p><span class='who'>{who}</span>{_underlined(text, noun, turn)}</p>")
        for name, line in lines.items():
            rows.append(f"<p><span class='who'>{_e(name)}</span>{_answer(line, nouns.get(name))}</p>")
        return f"<div class='card'>{''.join(rows)}{self._strip(shown.clip, nouns)}</div>"

    def _strip(self, clip: str, nouns: Mapping[str, Noun]) -> str:
        noun = next(iter(nouns.values()))
        num_steps = len(noun.frames)
        steps = np.linspace(0, num_steps - 1, min(num_steps, self.max_steps)).round().astype(int)
        frames, masks = [], []
        try:
            for step in steps:
                frame, mask = self._annotated_frame(clip, noun, step)
                frames.append(frame)
                masks.append(mask)
            pictures = self.frames_for(clip, frames)
        except (OSError, RuntimeError, ValueError) as error:
            return f"<p class='wrong'>The frames could not be read: {_e(error)}</p>"
        png = strip_png(
            pictures,
            {name: noun.map[steps] for name, noun in nouns.items()},
            masks=masks,
            titles=[f"frame {frame}" for frame in frames],
            uniform=float(noun.map.mean()),
        )
        return _image(png, f"attention of “{noun.text}” in {clip}")

    def _annotated_frame(self, clip: str, noun: Noun, step: int) -> tuple[int, np.ndarray | None]:
        """The first frame of the step in which one of the noun's objects has a mask, else the first frame."""
        for frame in noun.frames[step]:
            masks = [self.mask_for(clip, object_id, frame) for object_id in noun.object_ids]
            if found := [mask for mask in masks if mask is not None]:
                return frame, np.logical_or.reduce(found)
        return noun.frames[step][0], None


def _headline(results: Mapping[str, Any], names: Sequence[str]) -> str:
    last = results[names[-1]]
    if last["pointing"]["value"] is None:
        return "No annotated noun could be scored, so this page says nothing about attention."
    uniform = last["baselines"]["uniform"]["metrics"]["pointing"]["value"]
    floor = "" if uniform is None else f" A uniform map would reach {_percent(uniform)}."
    here = (
        f"the maximum of a noun’s attention falls on its object in {_percent(last['pointing']['value'])} of the steps"
    )
    accuracy = _percent(last["accuracy"]["value"])
    if len(names) == 1:
        text = (
            f"In <b>{_e(names[0])}</b>, {here}{_range(last['pointing'])}.{floor} {accuracy} of the answers are right."
        )
    else:
        base, difference = results[names[0]], results["difference"]
        text = (
            f"In <b>{_e(names[-1])}</b>, {here}, in <b>{_e(names[0])}</b> in {_percent(base['pointing']['value'])}: "
            f"{_change(difference['pointing'])}.{floor} "
            f"{accuracy} of the answers are right against {_percent(base['accuracy']['value'])}: "
            f"{_change(difference['accuracy'])}."
        )
    lost = {name: results[name]["coverage"]["failed"] + results[name]["coverage"]["missing"] for name in names}
    if any(lost.values()):
        expected = last["coverage"]["expected"]
        each = ", ".join(f"{num} of {expected} ({_e(name)})" for name, num in lost.items() if num)
        text += f" Ids without a usable prediction count as worst: {each}."
    return text


def _score_table(results: Mapping[str, Any], names: Sequence[str]) -> str:
    two = len(names) == 2
    heads = ["", *names, *(["difference"] if two else []), "uniform", "centre"]
    heads += [f"wrong noun, {name}" for name in names] if two else ["wrong noun"]
    rows = []
    for metric in ("accuracy", *METRICS):
        cells = [f"<td class='key'>{_estimate(results[name][metric])}</td>" for name in names]
        if two:
            cells.append(f"<td>{_difference(results['difference'][metric])}</td>")
        columns = [(names[-1], "uniform"), (names[-1], "centre"), *((name, "wrong_noun") for name in names)]
        for name, baseline in columns:
            value = results[name]["baselines"][baseline]["metrics"].get(metric, {}).get("value")
            cells.append(f"<td>{_number(value)}</td>")
        rows.append(f"<tr><th>{NAMES[metric]}</th>{''.join(cells)}</tr>")
    for key, label in COSTS.items():
        values = [results[name].get(key) for name in names]
        if any(value is not None for value in values):
            cells = [f"<td>{_quantity(value)}</td>" for value in values]
            if two:
                both = None not in values and values[0] > 0
                cells.append(f"<td>{(values[1] / values[0] - 1) * 100:+.1f} %</td>" if both else "<td>–</td>")
            rows.append(f"<tr><th>{label}</th>{''.join(cells)}{'<td></td>' * (len(names) + 2)}</tr>")
    excluded = max(results[name]["baselines"]["wrong_noun"]["excluded_clips"] for name in names)
    note = (
        "Below each value: 95 % bootstrap interval, drawn by clip. Uniform, centre (a Gaussian) and wrong noun (the "
        "maps of the clip’s other nouns on this noun’s mask) are what a map reaches without knowing the noun, scored "
        "by the same code."
    )
    if two:
        note += " A difference in bold has an interval that excludes zero."
    if excluded:
        note += f" Up to {excluded} clips have no other usable noun and are left out of wrong noun."
    head = "".join(f"<th>{_e(text)}</th>" for text in heads)
    return (
        f"<table class='wide'><caption>{note}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _task_table(results: Mapping[str, Any], names: Sequence[str]) -> str:
    tasks = dict.fromkeys(task for name in names for task in results[name]["accuracy_by_task"])
    rows = []
    for task in tasks:
        of_arms = [results[name]["accuracy_by_task"].get(task) for name in names]
        num, chance = next((arm["num"], arm["chance"]) for arm in reversed(of_arms) if arm)
        cells = "".join(f"<td>{_estimate(arm) if arm else '–'}</td>" for arm in of_arms)
        rows.append(f"<tr><th>{_e(task)}</th>{cells}<td>{_number(chance)}</td><td>{num}</td></tr>")
    head = "".join(f"<th>{_e(text)}</th>" for text in ("answers by task", *names, "chance", "questions"))
    note = "Chance is the share of the most frequent target."
    return f"<table><caption>{note}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _coverage(results: Mapping[str, Any], names: Sequence[str]) -> str:
    rows: dict[str, list[Any]] = {}
    for name in names:
        coverage = results[name]["coverage"]
        for key in ("expected", "predicted", "scored", "failed", "missing", "clips", "annotated_clips", "nouns"):
            rows.setdefault(key.replace("_", " "), []).append(coverage[key])
        for kind in ("scored", "absent", "unannotated"):
            rows.setdefault(f"steps {kind}", []).append(coverage["steps"][kind])
    note = (
        "Absent: annotated with an empty mask. Steps that are absent or unannotated have no alignment and are skipped."
    )
    tables = _plain_table(rows, names, note)
    if any(results[name]["failures"] for name in names):
        scored_only = {
            NAMES[metric]: [_number(results[name][metric]["value_scored_only"]) for name in names]
            for metric in ("accuracy", *METRICS)
        }
        tables += _plain_table(
            scored_only, names, "For comparison only: the scores without the failed and missing ids."
        )
    return f"<div class='row'>{tables}</div>"


def _plain_table(rows: Mapping[str, Sequence[Any]], names: Sequence[str], note: str) -> str:
    head = "".join(f"<th>{_e(name)}</th>" for name in ("", *names))
    body = "".join(
        f"<tr><th>{_e(key)}</th>{''.join(f'<td>{_e(value)}</td>' for value in values)}</tr>"
        for key, values in rows.items()
    )
    return f"<table><caption>{note}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _failures(failures: Sequence[Mapping[str, Any]], name: str) -> str:
    if not failures:
        return f"<p>{_e(name)}: every expected id has a usable prediction.</p>"
    rows = "".join(f"<tr><td>{_e(failure['id'])}</td><td>{_e(failure['reason'])}</td></tr>" for failure in failures)
    return (
        f"<h3>{_e(name)}: {len(failures)} ids without a usable prediction</h3>"
        f"<div class='scroll'><table><tbody>{rows}</tbody></table></div>"
    )


def _quarantine(entries: Sequence[Mapping[str, Any]], name: str) -> str:
    if not entries:
        return ""
    keys = list(dict.fromkeys(key for entry in entries for key in entry))
    head = "".join(f"<th>{_e(key)}</th>" for key in keys)
    rows = "".join(
        "<tr>" + "".join(f"<td>{_e(entry.get(key, ''))}</td>" for key in keys) + "</tr>" for entry in entries
    )
    return (
        f"<h3>{_e(name)}: {len(entries)} samples quarantined in training</h3><div class='scroll'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _underlined(text: str, noun: Noun, turn: int) -> str:
    if noun.turn != turn or text[noun.start : noun.end] != noun.text:
        return _e(text)
    return f"{_e(text[: noun.start])}<mark>{_e(noun.text)}</mark>{_e(text[noun.end :])}"


def _answer(line: Prediction | None, noun: Noun | None) -> str:
    if line is None or line.error is not None:
        return f"<span class='wrong'>{_e(line.error if line else 'no prediction')}</span>"
    right = is_correct(line.answer, line.target)
    text = (
        f"<span class='{'right' if right else 'wrong'}'>{'✓' if right else '✗'} {_e(line.answer) or '(empty)'}</span>"
    )
    metrics = noun and noun_metrics(noun.map, noun.coverage)
    if not metrics:
        return text + "<span class='nums'>no annotated step</span>"
    numbers = " · ".join(f"{NAMES[metric]} {metrics[metric]:.2f}" for metric in ("pointing", "mass", "ap"))
    return f"{text}<span class='nums'>{numbers}</span>"


def _tree(value: Any) -> str:
    if isinstance(value, Mapping):
        rows = "".join(f"<tr><th>{_e(key)}</th><td>{_tree(entry)}</td></tr>" for key, entry in value.items())
        return f"<table><tbody>{rows}</tbody></table>"
    return _e(", ".join(map(str, value)) if isinstance(value, list | tuple) else value)


def _e(value: object) -> str:
    return html.escape(str(value))


def _image(png: bytes, alt: str) -> str:
    return f'<img alt="{_e(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def _quantity(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _estimate(estimate: Mapping[str, Any]) -> str:
    low_high = estimate["interval"]
    return _number(estimate["value"]) + (
        f"<small>{_number(low_high[0])} … {_number(low_high[1])}</small>" if low_high else ""
    )


def _difference(difference: Mapping[str, Any]) -> str:
    if difference["value"] is None:
        return "–"
    value = _signed(difference["value"])
    if difference["interval"] is None:
        return value
    low, high = map(_signed, difference["interval"])
    return f"{f'<b>{value}</b>' if difference['excludes_zero'] else value}<small>{low} … {high}</small>"


def _range(estimate: Mapping[str, Any]) -> str:
    interval = estimate["interval"]
    return "" if interval is None else f" (95 % interval {100 * interval[0]:.0f} to {100 * interval[1]:.0f} %)"


def _change(difference: Mapping[str, Any]) -> str:
    """A difference of shares in words, in percentage points."""
    if difference["value"] is None:
        return "no clip in common"
    text = f"a difference of {100 * difference['value']:+.0f} points"
    if difference["interval"] is None:
        return f"{text} on one clip"
    low, high = (f"{100 * bound:+.0f}" for bound in difference["interval"])
    verdict = "" if difference["excludes_zero"] else ", not distinguishable from zero"
    return f"{text} (95 % interval {low} to {high}, {difference['clips']} clips{verdict})".replace("-", "−")


def _json_lines(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not Path(path).exists():
        return []
    lines: Iterable[str] = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]
