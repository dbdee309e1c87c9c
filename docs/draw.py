"""Draws the README's explanations: python docs/draw.py writes the five SVG files of PICTURES.

Plain SVG with text as text: each picture brings its own background, for a light and a dark page,
and its smallest letters are 17 of 640 units wide, so that a phone can show them.
"""

from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).resolve().parent
STYLE = """
  text { font: 17px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
  text { text-anchor: middle; } .left { text-anchor: start; }
  .bold { font-weight: 700; } .soft { fill: #59636e; } .on { fill: #ffffff; font-weight: 600; }
  .page { fill: #ffffff; } .box { fill: none; stroke: #59636e; stroke-width: 1.5; }
  .mark { fill: #1f2328; }
  .line { fill: none; stroke: #59636e; stroke-width: 2; } .tip { fill: #59636e; }
  .dash { fill: none; stroke-width: 2; stroke-dasharray: 5 4; }
  .c0 { fill: #2563eb; stroke: #2563eb; } .c1 { fill: #b45309; stroke: #b45309; }
  .c2 { fill: #15803d; stroke: #15803d; } .c3 { fill: #7e22ce; stroke: #7e22ce; }
  .c4 { fill: #be123c; stroke: #be123c; } .gray { fill: #59636e; stroke: #59636e; }
  .dash.c0, .dash.c1, .dash.c2 { fill: none; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .soft { fill: #9da7b3; } .on { fill: #ffffff; }
    .page { fill: #0d1117; } .box, .line { stroke: #9da7b3; } .tip { fill: #9da7b3; }
    .mark { fill: #e6edf3; }
    .dash.c0 { stroke: #6ea0ff; } .dash.c1 { stroke: #f0a35e; } .dash.c2 { stroke: #56c271; }
  }
"""


class Picture:
    """An SVG file under construction, 640 units wide."""

    def __init__(self, height: int):
        self.height, self.parts = height, []
        self.rect(0, 0, 640, height, "page", radius=8)

    def rect(self, x, y, width, height, look, radius=0) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" '
            f'class="{look}"/>'
        )

    def text(self, x, y, words, look="") -> None:
        """Words in one line whose middle is at height `y`, and at `x` unless `look` has "left"."""
        look = f' class="{look}"' if look else ""
        self.parts.append(f'<text x="{x:g}" y="{y + 6:g}"{look}>{escape(words)}</text>')

    def label(self, x, y, width, height, words, look) -> None:
        """A filled box with words in it."""
        self.rect(x, y, width, height, look, radius=4)
        self.text(x + width / 2, y + height / 2, words, "on")

    def arrow(self, *corners, both=False) -> None:
        """An arrow from corner to corner, of which neighbours share x or y."""
        points = "L".join(f"{x:g} {y:g}" for x, y in corners)
        self.parts.append(f'<path d="M{points}" class="line"/>')
        for (from_x, from_y), (x, y) in [corners[-2:], corners[1::-1]][: 1 + both]:
            dx, dy = ((x > from_x) - (x < from_x)), ((y > from_y) - (y < from_y))
            back_x, back_y = x - 9 * dx, y - 9 * dy
            self.parts.append(
                f'<path d="M{x + 2 * dx:g} {y + 2 * dy:g}L{back_x + 6 * dy:g} {back_y + 6 * dx:g}'
                f'L{back_x - 6 * dy:g} {back_y - 6 * dx:g}Z" class="tip"/>'
            )

    def lines(self, y, words: str) -> None:
        """A paragraph, a line of `words` below the other."""
        for i, line in enumerate(words.splitlines()):
            self.text(16, y + 22 * i, line, "soft left")

    def key(self, x, y, look, words) -> None:
        """One entry of a legend."""
        self.rect(x, y, 24, 24, look, radius=4)
        self.text(x + 32, y + 12, words, "left")

    def finish(self, title: str) -> str:
        """The text of the file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {self.height}" role="img">'
        )
        body = [f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", *self.parts]
        return "\n".join([head, *body, "</svg>\n"])


def idea() -> str:
    """Six ranks: TP shards two matrices in three, FSDP shards each third in two."""
    p = Picture(816)
    p.text(320, 26, "--tp 3 on 6 GPUs: TP shards each matrix in three", "bold")
    p.text(170, 60, "up_proj")
    p.text(470, 60, "down_proj")
    for i in range(3):
        p.label(95 + 51 * i, 76, 49, 132, f"tp {i}", f"c{i}")
        p.label(395, 76 + 45 * i, 150, 42, f"tp {i}", f"c{i}")
    p.text(170, 226, "by columns")
    p.text(470, 226, "by rows")
    p.text(320, 254, "Drawn as in x @ W.T: a column makes one output feature,", "soft")
    p.text(320, 276, "a row takes one input feature. nn.Linear stores W.", "soft")
    p.text(320, 316, "FSDP halves each TP shard, again by columns", "bold")
    for dp in range(2):
        y = 338 + 194 * dp
        p.text(53, y + 52, f"dp {dp}", "bold")
        p.text(53, y + 76, "sequences", "soft")
        p.text(53, y + 97, "2 and 3" if dp else "0 and 1", "soft")
        for tp in range(3):
            x = 104 + 188 * tp
            p.rect(x, y, 148, 148, "box", radius=8)
            p.text(x + 74, y + 18, f"rank {3 * dp + tp}", "bold")
            for half in range(2):
                mine = f"c{tp}" if half == dp else f"dash c{tp}"
                p.rect(x + 12 + 21 * half, y + 36, 20, 72, mine)
                p.rect(x + 68 + 35 * half, y + 60, 34, 24, mine)
            p.text(x + 32, y + 128, "up")
            p.text(x + 102, y + 128, "down")
            if tp:
                p.arrow((x - 33, y + 74), (x - 7, y + 74), both=True)
                p.text(x - 20, y + 54, "TP")
            if not dp:
                p.arrow((x + 74, y + 156), (x + 74, y + 186), both=True)
                p.text(x + 108, y + 171, "FSDP")
    p.lines(
        704,
        "TP, along a row: three ranks compute each layer together, on the\n"
        "same sequences, and exchange activations inside the layer.\n"
        "FSDP, along a column: two ranks have different sequences. Each\n"
        "gathers the half that it lacks (dashed) before a layer runs, and\n"
        "frees it afterwards. In the backward pass they average gradients.",
    )
    return p.finish("2-way FSDP x 3-way TP on 6 ranks")


def pair() -> str:
    """Why a column-wise and a row-wise matrix need nothing sent between them, but a sum."""
    p = Picture(540)
    p.text(320, 26, "Column-wise, then row-wise: nothing is sent in between", "bold")
    for rank in range(2):
        y, color = 138 + 192 * rank, f"c{rank}"  # the middle of this rank's row
        p.text(22, y - 58, f"tp rank {rank}", "bold left")
        p.label(22, y - 38, 76, 76, "x", "gray")
        p.text(111, y, "@")
        p.label(250, y - 38, 52, 76, "h", color)
        p.text(330, y - 18, "SiLU")
        p.arrow((307, y), (352, y))
        p.label(358, y - 38, 52, 76, "h'", color)
        p.text(423, y, "@")
        for i in range(2):
            mine = color if i == rank else f"dash {color}"
            p.rect(124 + 52 * i, y - 38, 52, 76, mine)
            p.rect(436, y - 52 + 52 * i, 76, 52, mine)
        p.text(150 + 52 * rank, y, f"tp {rank}", "on")
        p.text(474, y - 26 + 52 * rank, f"tp {rank}", "on")
        p.text(239, y, "=")
        p.text(526, y, "=")
        p.label(542, y - 38, 76, 76, "partial", color)
        p.arrow((580, y + 44 - 88 * rank), (580, y + 76 - 152 * rank))
    p.text(176, 80, "up_proj")
    p.text(474, 68, "down_proj")
    p.rect(444, 216, 174, 36, "box", radius=4)
    p.text(531, 234, "all-reduce: +", "bold")
    p.arrow((438, 234), (386, 234))
    p.label(304, 196, 76, 76, "y", "gray")
    p.text(196, 234, "the same on both ranks")
    for x, shape in (60, "(B, S, D)"), (276, "(B, S, F/T)"), (580, "(B, S, D)"):
        p.text(x, 402, shape, "soft")
    p.lines(
        440,
        "Each column of up_proj gives its feature of h, and SiLU works on each\n"
        "alone. Only the sum of the partial results needs the other rank.\n"
        "Drawn as in x @ W.T: nn.Linear stores W, so the weight of up_proj is\n"
        "Shard(0), that of down_proj Shard(1). gate_proj: like up_proj.",
    )
    return p.finish("A column-wise and a row-wise matrix product on two ranks")


def layer() -> str:
    """One decoder layer on one rank of a TP group, downwards, with shapes and collectives."""
    sharded, gathered = "(B, S/T, D)", "(B, S, D)"
    rows = [
        ("norm", "gray", sharded, "all-reduce of its gradient"),
        ("all-gather", "box", gathered, "reduce-scatter"),
        ("q_proj, k_proj, v_proj", "c0", "q: (B, S, H/T)", ""),
        ("attention, own heads", "c0", "(B, S, H/T)", ""),
        ("o_proj", "c1", "partial (B, S, D)", ""),
        ("reduce-scatter", "box", sharded, "all-gather"),
        ("+ residual stream", "line", sharded, ""),
        ("norm", "gray", sharded, "all-reduce of its gradient"),
        ("all-gather", "box", gathered, "reduce-scatter"),
        ("gate_proj, up_proj", "c0", "(B, S, F/T)", ""),
        ("SiLU, product", "c0", "(B, S, F/T)", ""),
        ("down_proj", "c1", "partial (B, S, D)", ""),
        ("reduce-scatter", "box", sharded, "all-gather"),
        ("+ residual stream", "line", sharded, ""),
    ]
    p = Picture(864)
    p.text(146, 28, "forward, down", "bold")
    p.text(344, 28, "local shape", "bold")
    p.text(522, 28, "backward, up", "bold")
    p.text(146, 62, "residual stream (B, S/T, D)")
    p.arrow((146, 76), (146, 86))
    for i, (name, look, shape, backward) in enumerate(rows):
        y = 90 + 47 * i
        if look == "line":
            p.text(146, y + 17, name)
        elif look == "box":
            p.rect(36, y, 220, 33, "box", radius=4)
            p.text(146, y + 17, name, "bold")
        else:
            p.label(36, y, 220, 33, name, look)
        p.arrow((146, y + 35), (146, y + 43))
        p.text(344, y + 17, shape, "soft")
        if backward:
            p.text(522, y + 17, backward, "bold" if look == "box" else "")
    for start in (76, 76 + 47 * 7):  # the stream goes around attention and MLP
        end = start + 47 * 6 + 31
        p.arrow((142, start), (18, start), (18, end), (64, end))
    legend = {16: ("c0", "column-wise"), 166: ("c1", "row-wise"), 296: ("gray", "replicated")}
    legend[442] = "box", "collective over tp"
    for x, (look, words) in legend.items():
        p.key(x, 766, look, words)
    p.lines(
        820,
        "4 collectives forward and 4 backward (bold). In each of them a rank\n"
        "sends B S D (T - 1) / T elements; a norm's gradient has D.",
    )
    return p.finish("A decoder layer on one rank of a TP group")


def timeline() -> str:
    """FSDP communicates while it computes, TP in between. A sketch, nothing measured."""
    p = Picture(496)
    titles = (
        "FSDP, forward: gathers the next layer while this one computes",
        "FSDP, backward: gathers again, reduce-scatters the gradients",
        "TP: nothing of a layer can compute before its input is there",
    )
    for i, title in enumerate(titles):
        p.text(16, 26 + 130 * i, title, "bold left")
        p.text(16, 62 + 130 * i, "compute", "left")
        p.text(16, 100 + 130 * i, "network", "left")
    looks = {"AG": "c1", "RS": "c3"}
    forward = {108: "AG 0", 166: "AG 1", 299: "AG 2", 432: "AG h"}
    backward = {108: "AG 2", 166: "RS h", 224: "AG 1", 299: "RS 2", 357: "AG 0", 432: "RS 1"}
    for y, events in (84, forward), (214, backward | {565: "RS 0"}):
        for x, words in events.items():
            p.label(x, y, 56, 32, words, looks[words[:2]])
    for i in range(3):
        p.label(166 + 133 * i, 46, 131, 32, f"layer {i}", "c0")
        p.label(166 + 133 * i, 176, 131, 32, f"layer {2 - i}", "c0")
    p.label(565, 46, 56, 32, "head", "c0")
    p.label(108, 176, 56, 32, "head", "c0")
    x = 108
    for words in ("norm", "attention", "norm", "MLP"):
        width, then = (60, "AG") if words == "norm" else (102, "RS")
        p.label(x, 306, width, 32, words, "c0")
        p.label(x + width + 1, 344, 46, 32, then, looks[then])
        x += width + 48
    p.lines(
        408,
        "One micro-batch, as a sketch. AG: all-gather, RS: reduce-scatter, h: the\n"
        "head. FSDP's, of weights and gradients, are hidden if a layer computes\n"
        "for long enough, so with more tokens. TP's, of activations, are never\n"
        "hidden, and grow with the tokens: they belong on the fastest links.",
    )
    return p.finish("FSDP communicates beside the computation, TP between its parts")


def memory() -> str:
    """Stacked bars of the table of an 8B at 4096 tokens in plan.md."""
    text = (HERE / "plan.md").read_text()
    table = text[text.index("**llama-3.1-8b on 8 ranks, sequences of 4096") :].split("\n\n")[1]
    head, _, *rows = [[c.strip(" *") for c in line.split("|")] for line in table.splitlines()]
    rows = [dict(zip(head, row, strict=True)) for row in rows]
    parts = {"states": ["parameters", "gradients", "optimizer"], "gathered unit": ["largest unit"]}
    parts |= {"activations": ["activations"], "logits, loss": ["logits, loss"]}
    colors = ("c0", "c2", "c1", "c3")
    p = Picture(172 + 58 * len(rows))
    scale = 380 / max(float(row["peak"]) for row in rows)
    p.text(16, 26, "Llama 3.1 8B on 8 GPUs, 8 x 4096 tokens a step: GiB per rank", "bold left")
    p.lines(
        54,
        "Predicted by plan.py. The mark is the peak. It is less than the sum of\n"
        "the parts, since the gradients come while the activations go.",
    )
    p.text(16, 118, "dp x tp", "bold left")
    for i, row in enumerate(rows):
        y, x = 138 + 58 * i, 186
        words = row["dp x tp"] + ", recompute" * (row["recompute"] == "yes")
        p.text(16, y + 13, words, "left")
        mark = x + scale * float(row["peak"])
        for look, columns in zip(colors, parts.values(), strict=True):
            width = scale * sum(float(row[column]) for column in columns)
            p.rect(x, y, width, 26, look)
            x += width
        p.rect(mark - 2, y - 4, 4, 34, "mark")
        p.text(mark, y - 14, f"peak {row['peak']}", "bold")
    y, x = 134 + 58 * len(rows), 16
    for look, words in zip(colors, parts, strict=True):
        p.key(x, y, look, words)
        x += 66 + 9 * len(words)
    return p.finish("Predicted memory of Llama 3.1 8B on four layouts")


PICTURES = (idea, pair, layer, timeline, memory)

if __name__ == "__main__":
    for picture in PICTURES:
        (HERE / f"{picture.__name__}.svg").write_text(picture())
