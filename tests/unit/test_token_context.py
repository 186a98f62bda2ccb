"""What layers know of packed tokens, against plain loops and against padding as torch does it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mome_dist.speech.sequence import AUDIO, VIDEO, Example, pack
from mome_dist.speech.views import View
from mome_dist.token_context import Modality, Padding, TokenContext

# Three views of clips of odd lengths, 28 tokens: four dead ones fill up 32.
SEQUENCES = [("asr(4)", [5, 3, 1]), ("vsr(2)", [2, 4, 6]), ("avsr(4,2)", [7])]
LENGTHS = [length for _, lengths in SEQUENCES for length in lengths]


def test_of_whole_sequences_against_a_loop() -> None:
    modality = [number % 3 for number in range(28)]
    context = TokenContext.of(SEQUENCES, modality)
    positions: list[int] = []
    views: list[int] = []
    for view, (_, lengths) in enumerate(SEQUENCES):
        for length in lengths:
            positions += range(length)
            views += [view] * length
    assert context.lengths == tuple(LENGTHS) and context.view_sequences == (3, 3, 1)
    assert context.view_names == ("asr(4)", "vsr(2)", "avsr(4,2)")
    assert (context.tokens, context.alive) == (32, 28)
    assert context.positions_N.tolist() == [*positions, 0, 0, 0, 0]
    assert context.members_VN.tolist() == [[float(own == view) for own in [*views, *[-1] * 4]] for view in range(3)]
    assert context.sizes_V2.tolist() == [[9, 9], [12, 12], [7, 11]], "dead tokens count with the last view"
    assert context.modality_N.tolist() == [*modality, *[int(Modality.TEXT)] * 4]
    assert context.alive_N is not None and context.alive_N.tolist() == [True] * 28 + [False] * 4
    # Dead tokens are one more sequence to a kernel that reads sequences where they are.
    assert context.starts_B1.tolist() == [0, *itertools.accumulate([*LENGTHS, 4])]
    assert context.starts_B1.dtype is torch.int32


def test_where_no_token_is_dead_none_is_spoken_of() -> None:
    context = TokenContext.of(SEQUENCES, multiple=7)
    assert context.tokens == context.alive == 28 and context.alive_N is None
    assert context.starts_B1.tolist() == [0, *itertools.accumulate(LENGTHS)]
    assert context.modality_N.eq(int(Modality.TEXT)).all()


@pytest.mark.parametrize(
    ("multiple", "least", "tokens"), [(1, 0, 28), (8, 0, 32), (8, 33, 40), (1, 30, 30), (16, 8, 32)]
)
def test_numbers_of_tokens_are_rounded_up(multiple: int, least: int, tokens: int) -> None:
    assert TokenContext.of(SEQUENCES, multiple=multiple, least=least).tokens == tokens


@pytest.mark.parametrize("dead", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_parts_add_up_to_the_whole(ranks: int, dead: bool) -> None:
    # With eight more dead tokens the last of four parts has nothing else.
    whole = TokenContext.of(SEQUENCES, torch.arange(28) % 3, 4, least=40 if dead else 0)
    parts = [whole.part(rank, ranks) for rank in range(ranks)]
    for name in ("modality_N", "positions_N"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert torch.equal(torch.cat([part.members_VN for part in parts], dim=1), whole.members_VN)
    assert torch.equal(torch.stack([part.sizes_V2 for part in parts]).sum(dim=0), whole.sizes_V2)
    alive = [torch.ones(part.tokens, dtype=torch.bool) if part.alive_N is None else part.alive_N for part in parts]
    assert (whole.alive_N is not None) == dead
    assert torch.equal(torch.cat(alive), torch.ones(28).bool() if whole.alive_N is None else whole.alive_N)
    for part in parts:
        assert part.tokens * ranks == whole.tokens
        # What looks at sequences looks at those of the whole pass.
        assert (part.lengths, part.view_names, part.view_sequences) == (
            whole.lengths,
            whole.view_names,
            whole.view_sequences,
        )


def _padded_by_torch(rows_NX: Tensor) -> list[Tensor]:
    """[B, S, X] of each view."""
    sequences = rows_NX[:28].split(LENGTHS)
    return [pad_sequence(sequences[first:stop], batch_first=True) for first, stop in ((0, 3), (3, 6), (6, 7))]


def _real_places() -> Tensor:
    """Bool [P], where a padded batch holds a token."""
    return torch.cat([batch.flatten(0, 1)[:, 0] for batch in _padded_by_torch(torch.ones(32, 1))]).bool()


def test_padding_is_that_of_torch_and_is_undone() -> None:
    rows_NX = torch.randn(32, 2, 3, generator=torch.Generator().manual_seed(0))
    padding = TokenContext.of(SEQUENCES).padding
    padded_PX, real_P = padding.pad(rows_NX), _real_places()
    assert padding.shapes == ((3, 5), (3, 6), (1, 7)) and padded_PX.shape == (15 + 18 + 7, 2, 3)
    by_torch_PX = torch.cat([batch.flatten(0, 1) for batch in _padded_by_torch(rows_NX.flatten(1))]).view(-1, 2, 3)
    assert torch.equal(padded_PX[real_P], by_torch_PX[real_P])
    assert padded_PX[~real_P].isfinite().all(), "what is repeated is a token"
    stripped_NX = padding.strip(padded_PX, 32)
    assert torch.equal(stripped_NX[:28], rows_NX[:28]) and not stripped_NX[28:].any()
    assert torch.equal(padding.strip(padded_PX, 28), rows_NX[:28])


def test_gradients_of_padding_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    rows_NX = torch.randn(32, 3, generator=generator, requires_grad=True)
    gradient_PX = torch.randn(40, 3, generator=generator)
    padding = TokenContext.of(SEQUENCES).padding
    # Whatever comes to a repeated token stays there: padding of torch's is zeros, to which nothing comes back either.
    (found,) = torch.autograd.grad(padding.pad(rows_NX), rows_NX, gradient_PX)
    by_torch_PX = torch.cat([batch.flatten(0, 1) for batch in _padded_by_torch(rows_NX)])
    (expected,) = torch.autograd.grad(by_torch_PX, rows_NX, gradient_PX)
    assert torch.equal(found, expected) and found[:28].all() and not found[28:].any()


@pytest.mark.parametrize("tokens", [28, 32])
def test_gradients_of_padding_are_right(tokens: int) -> None:
    padding, real_P1 = Padding.of(LENGTHS, (3, 3, 1), torch.device("cpu")), _real_places()[:, None].double()
    generator = torch.Generator().manual_seed(0)
    rows_NX = torch.randn(tokens, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    rows_PX = torch.randn(40, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: padding.pad(rows) * real_P1, (rows_NX,))
    assert torch.autograd.gradcheck(lambda rows: padding.strip(rows, tokens), (rows_PX,))


VIEWS = [View("avsr", 4, 2), View("asr", 16, None), View("vsr", None, 5), View("asr", 16, None)]


def _example(view: View, clip: int) -> Example:
    """Ids that tell what a token is: text above 1,000, tags above 100."""
    ids = [100]
    if view.audio_rate is not None:
        ids += [101, *[AUDIO] * (4 + clip), 102]
    if view.video_rate is not None:
        ids += [103, *[VIDEO] * (2 * clip + 1), 104]
    return Example([*ids, *range(1000 * (clip + 1), 1000 * (clip + 1) + clip + 2)], len(ids))


def test_flat_positions_of_speech_and_labels_against_a_loop() -> None:
    sequences = [(view, [_example(view, clip) for clip in range(3)]) for view in VIEWS]
    tokens = pack(sequences, absent=lambda view, clip, stream: (view.task, clip, stream) == ("avsr", 1, "video"))
    ids, modality, index, labels, speech, at = [], [], [], [], [], 0
    for view, examples in sequences:
        places: dict[str, list[tuple[int, bool]]] = {"audio": [], "video": []}
        for clip, example in enumerate(examples):
            for place, token in enumerate(example.ids[:-1]):
                ids.append(max(token, 0))
                modality.append({AUDIO: 1, VIDEO: 2}.get(token, 0))
                if token in (AUDIO, VIDEO):
                    stream = "audio" if token == AUDIO else "video"
                    places[stream].append((at, (view.task, clip, stream) == ("avsr", 1, "video")))
                if place + 1 >= example.prefix_length:
                    index.append(at)
                    labels.append(example.ids[place + 1])
                at += 1
        speech += [(stream, found) for stream, found in places.items() if found]
    dead = -at % 8
    assert tokens.views == tuple(VIEWS) and tokens.ids_N.tolist() == ids + [0] * dead
    assert tokens.context.modality_N.tolist() == modality + [0] * dead
    assert tokens.context.lengths == tuple(len(each.ids) - 1 for _, examples in sequences for each in examples)
    assert tokens.context.view_names == tuple(map(str, VIEWS))
    assert tokens.labels.index_L.tolist() == index and tokens.labels.ids_L.tolist() == labels
    assert all(label >= 1000 for label in labels) and len(labels) == 4 * (2 + 3 + 4)
    assert [place.stream for place in tokens.speech] == [stream for stream, _ in speech]
    assert [place.rate for place in tokens.speech] == [4, 2, 16, 5, 16]
    for laid, (_, found) in zip(tokens.speech, speech, strict=True):
        assert laid.index_T.tolist() == [position for position, _ in found]
        absent = [missing for _, missing in found]
        assert (laid.absent_T is None) == (not any(absent))
        assert laid.absent_T is None or laid.absent_T.tolist() == absent
    assert tokens.speech[1].absent_T is not None and int(tokens.speech[1].absent_T.sum()) == 3
