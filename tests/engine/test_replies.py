"""A client may say anything: a reply is held to what was asked, and what is wrong with it is its client's failure."""

import dataclasses
import io
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hostile import EXAMPLES, HOSTILE, RAISED, absent, honest, statistics
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import replies

from fl_taskarith.engine.client_questions import check_squares
from fl_taskarith.engine.question import SHARE, Question, Range
from fl_taskarith.engine.records import read_array, to_record
from fl_taskarith.engine.replies import Failures, answer_to
from fl_taskarith.engine.sequential import ensure_run_identity
from fl_taskarith.errors import LONGEST, ClientFailure, Divergence, named_error, printable
from fl_taskarith.mixtures.expectation_maximisation import Statistics
from fl_taskarith.models.heads import RidgeStatistics

CPU = torch.device("cpu")
SOUND = {"num-examples": 7, "train-seconds": 0.1, "partition-id": 2, "round": 3}
ASKED = Question(3, range(5), layouts={"arrays": {"a": (torch.float32, (2, 3))}}, largest_norm=lambda *_: 10.0,
                 examples_of=lambda _: 7, frozen_name="")  # fmt: skip


def message_to(client: int = 2) -> Message:
    ensure_run_identity()
    message = Message(RecordDict(), client, "train")
    message.metadata.__dict__["_message_id"] = f"to {client}"
    return message


def reply(tensors: dict[str, torch.Tensor] | None = None, client: int = 2, **metrics: object) -> Message:
    told = {name: value for name, value in (SOUND | {"partition-id": client}).items()}
    told |= {name.replace("_", "-"): value for name, value in metrics.items()}
    arrays = to_record({"a": torch.ones(2, 3)} if tensors is None else tensors)
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({k: v for k, v in told.items() if v is not None})})
    return Message(content, reply_to=message_to(client))


def read(*sent: Message, policy: str = "stop", question: Question = ASKED) -> list[float]:
    """The clients whose replies are taken."""
    failures = Failures(policy)
    return [each.client for each in
            failures.read(sent, lambda message: question.read(message, CPU, failures.most_seconds))]  # fmt: skip


def test_a_sound_reply_is_taken_and_what_can_be_measured_is_measured() -> None:
    answer = ASKED.read(reply(), CPU, 1.0)
    assert answer.numbers == {"num-examples": 7.0, "train-seconds": 0.1}
    assert answer.norms["arrays"] == pytest.approx(math.sqrt(6))
    assert answer.bytes == 2 * 3 * 4 + 128 + 1
    assert answer.state is None


@pytest.mark.parametrize(
    ("metrics", "told"),
    [({"num_examples": 8}, "of 8 examples, and its shard holds 7"), ({"num_examples": None}, "is missing or no number"),
     ({"num_examples": [7]}, ""), ({"num_examples": [7, 7]}, "is missing or no number"),
     ({"train_seconds": -1.0}, "from 0 to 1"), ({"train_seconds": math.nan}, "is nan"),
     ({"train_seconds": 1e6}, r"is 1e\+06, and must be from 0 to 1"), ({"partition_id": 4}, "partition-id = 4, not 2"),
     ({"round": 2}, "round = 2, not 3"), ({"update_norm": 1e308}, "not asked for: update-norm")],
    ids=str,
)  # fmt: skip
def test_numbers_lie_where_they_must(metrics: dict[str, object], told: str) -> None:
    if not told:
        assert read(reply(**metrics)) == [2]
        return
    with pytest.raises(ClientFailure, match=f"^Client 2 .*{told}"):
        read(reply(**metrics))
    assert read(reply(client=1), reply(**metrics), reply(client=3), policy="skip") == [1, 3]


@given(st.one_of(st.floats(), st.integers(), st.lists(st.floats(), max_size=2)))
@settings(max_examples=60, deadline=None)
def test_a_share_is_a_share(value: object) -> None:
    question = Question(3, numbers={"x": dataclasses.replace(SHARE, unknown=False)})
    message = Message(RecordDict({"metrics": MetricRecord({"x": 0.5})}), reply_to=message_to())
    message.content.metric_records["metrics"].__dict__["_data"]["x"] = value
    number = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(number, int | float) and 0 <= number <= 1:
        assert question.read(message, CPU, 1.0).numbers == {"x": float(number)}
    else:
        with pytest.raises(ClientFailure):
            read(message, question=question)


def test_a_number_below_its_range_is_no_divergence_and_one_above_is() -> None:
    question = Question(3, numbers={"loss": Range(0.0, 1e9, diverges=True)})
    for value, kind in ((-1.0, ClientFailure), (math.nan, Divergence), (math.inf, Divergence), (1e300, Divergence)):
        message = Message(RecordDict({"metrics": MetricRecord({"loss": value})}), reply_to=message_to())
        with pytest.raises(kind) as caught:
            read(message, question=question)
        assert type(caught.value) is kind


@pytest.mark.parametrize("entry", [math.nan, math.inf, 1e18, -3e38, 11.0])
def test_a_norm_beyond_the_bound_is_told_with_its_size(entry: float) -> None:
    tensor = torch.zeros(2, 3)
    tensor[1, 2] = entry
    told = f"has norm {abs(entry):.3g}, and may have 10".replace("+", r"\+") if math.isfinite(entry) else "NaN or inf"
    with pytest.raises(Divergence, match=f"^Client 2 .*{told}"):
        read(reply({"a": tensor}))


def test_who_was_not_asked_and_who_answers_twice_is_refused() -> None:
    assert read(reply(), reply(client=7), reply(), reply(client=1), policy="skip") == [2, 1]
    with pytest.raises(ClientFailure, match="Client 7 sent a reply and was not asked"):
        read(reply(client=7))
    with pytest.raises(ClientFailure, match="Client 2 sent a reply a second time"):
        read(reply(), reply())


def test_records_that_were_not_asked_for_are_refused() -> None:
    message = reply()
    message.content["mask"] = ArrayRecord()
    with pytest.raises(ClientFailure, match='the array records "arrays", "mask", not "arrays"'):
        read(message)
    for record, told in ((ConfigRecord({"name": "../x"}), "whose state is ../x"), (ConfigRecord({}), "has no name"),
                         (ConfigRecord({"name": "round-000002-ab.safetensors"}), "not of round 3")):  # fmt: skip
        message = reply()
        message.content["state"] = record
        with pytest.raises(ClientFailure, match=told):
            read(message)


# Arrays


def array_of(size: tuple[int, ...], **lies: object) -> Array:
    array = Array(np.arange(math.prod(size), dtype=np.float32).reshape(size))
    array.__dict__.update(lies)
    return array


def header(shape: tuple[int, ...], by_columns: bool = False, type_name: str = "<f4") -> bytes:
    file = io.BytesIO()
    descriptor = {"descr": type_name, "fortran_order": by_columns, "shape": shape}
    np.lib.format.write_array_header_1_0(file, descriptor)
    return file.getvalue()


@pytest.mark.parametrize("by_columns", [False, True])
def test_an_array_is_read_to_the_bit_in_either_order(by_columns: bool) -> None:
    values = np.asarray(np.arange(12, dtype=np.float32).reshape(3, 4), order="F" if by_columns else "C")
    tensor = read_array(Array(values), torch.float32, (3, 4))
    assert torch.equal(tensor, torch.from_numpy(np.ascontiguousarray(values)))
    assert tensor.is_contiguous()


@pytest.mark.parametrize(
    "array",
    [array_of((2, 3), shape=(3, 2)), array_of((3, 2)), array_of((2, 3), dtype="float64"), array_of((2, 3), dtype=None),
     array_of((2, 3), stype="pickle"), array_of((2, 3), data=b""), array_of((2, 3), data=header((2, 3))),
     array_of((2, 3), data=header((2**45,))), array_of((2, 3), data=header((2**45, 2**45))),
     array_of((2, 3), data=header((2, 3), type_name="<f8") + bytes(48)),
     array_of((2, 3), data=header((3, 2)) + bytes(24)),
     array_of((2, 3), data=header((2, 3)) + bytes(28)), array_of((2, 3), data=b"\x93NUMPY\x09\x00" + bytes(200)),
     array_of((2, 3), data=header((2, 3), type_name="|O") + bytes(24)), array_of((2, 3), data="text")],
)  # fmt: skip
def test_an_array_that_is_not_what_it_says_is_refused_before_it_takes_memory(array: Array) -> None:
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"^(as|in) "):
        read_array(array, torch.float32, (2, 3))
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, 3).to_sparse(), torch.ones(2, 3).double(), torch.ones(6), torch.nn.Parameter(torch.ones(2, 3))],
    ids=["sparse", "double", "flat", "parameter"],
)
def test_a_tensor_by_reference_is_a_plain_one_of_its_type(tensor: torch.Tensor) -> None:
    array = to_record({"a": torch.ones(2, 3)})["a"]
    array.__dict__["tensor"] = tensor
    with pytest.raises(ValueError, match=r"^as "):
        read_array(array, torch.float32, (2, 3))


# Words


@given(st.text(max_size=20), st.integers(1, 500))
@settings(max_examples=40, deadline=None)
def test_words_of_others_are_one_short_line_that_can_be_printed(text: str, times: int) -> None:
    for line in (printable(text * times), named_error(ValueError(text * times))):
        assert line.isprintable()
        assert len(line) <= LONGEST


def test_of_long_words_both_ends_stay() -> None:
    line = printable("CheckpointError: the state of client 3 is missing: " + "x" * 900 + ", or restore the file.")
    assert line.startswith("CheckpointError: the state of client 3 is missing: ")
    assert line.endswith(", or restore the file.")
    assert printable("a \x1b[31mred\u202e\nword") == "a ?[31mred? word"


# Clients of this process


@pytest.mark.parametrize("error", RAISED, ids=range(len(RAISED)))
def test_whatever_a_client_raises_is_its_failure(error: Callable[[], BaseException]) -> None:
    def client(message: Message) -> Message:
        raise error()

    answer = answer_to(message_to(), client)
    assert (answer.metadata.src_node_id, answer.has_error()) == (2, True)
    with pytest.raises(ClientFailure, match=r"^Client 2 failed: ") as caught:
        read(answer)
    assert str(caught.value).isprintable()

    def reading(_: Message) -> None:
        raise error()

    with pytest.raises(ClientFailure, match=r"^Client 2 sent a reply that cannot be used \(") as caught:
        list(Failures("stop").read([reply()], reading))
    assert str(caught.value).isprintable()
    assert list(Failures("skip").read([reply(), reply(client=3)], reading)) == []


def test_a_reply_to_another_message_is_none() -> None:
    other = Message(RecordDict(), reply_to=message_to(3))
    for sent in (None, 3, other, message_to(), Message(Error(7, "x"), reply_to=message_to(3))):
        assert answer_to(message_to(), lambda _, sent=sent: sent).error.reason.startswith("it sent no reply")
    mine = Message(RecordDict(), reply_to=message_to())
    assert answer_to(message_to(), lambda _: mine) is mine
    with pytest.raises(KeyboardInterrupt):
        answer_to(message_to(), lambda _: (_ for _ in ()).throw(KeyboardInterrupt))


# Sums over examples


def test_sums_of_features_and_classes_are_those_of_some_examples() -> None:
    sound = statistics(torch.Generator().manual_seed(0))
    sound.check(EXAMPLES)
    RidgeStatistics.of(torch.zeros(4, 6), torch.tensor([0, 0, 1, 1]), 3).check(4)
    RidgeStatistics.of(1e3 * torch.randn(2, 40), torch.tensor([0, 2]), 3).check(2)
    crooked, negative, unsummed = sound.gram.clone(), sound.gram.clone(), sound.class_counts.clone()
    crooked[0, 1] += 0.1
    negative[0, 0] = -1.0
    unsummed[0] += 1
    for change in (
        {"gram": crooked}, {"gram": negative}, {"gram": -sound.gram}, {"gram": sound.gram * 1e30},
        {"class_counts": unsummed}, {"class_counts": sound.class_counts - 0.5}, {"count": sound.count + 1},
        {"class_counts": torch.tensor([8.0, -1.0, 0.0]).double()}, {"feature_sum": sound.feature_sum + 100},
        {"class_sums": sound.class_sums * 100},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="it"):
            dataclasses.replace(sound, **change).check(EXAMPLES)


def test_sums_for_the_m_step_are_those_of_some_points() -> None:
    inputs = torch.randn(10, 3, dtype=torch.float64)
    gram = torch.stack([inputs.T @ inputs, torch.zeros(3, 3), 1e-280 * inputs.T @ inputs])
    moments = torch.stack([inputs.T @ inputs[:, 0], torch.zeros(3), torch.zeros(3)])
    Statistics(gram, moments).check(10, 1.0)
    crooked = gram.clone()
    crooked[0, 0, 1] += 0.1
    for grams, sums in ((crooked, moments), (-gram, moments), (1e6 * gram, moments), (gram, 1e6 * moments),
                        (gram, torch.full_like(moments, math.nan)), (gram - torch.eye(3) * 9, moments)):  # fmt: skip
        with pytest.raises(ValueError, match="Gram"):
            Statistics(grams, sums).check(10, 1.0)


def test_sums_of_squares_are_none_below_zero() -> None:
    check_squares({"a": torch.tensor([0.0, 5.0]), "none": torch.zeros(0)}, 7)
    for wrong in (-1e-6, math.nan, math.inf, 1e20):
        with pytest.raises(ValueError, match="is a sum of squares"):
            check_squares({"a": torch.tensor([0.0, wrong])}, 7)


# Strategies


def test_a_huge_control_is_refused_and_spoils_nobody_elses_next_round() -> None:
    def app(message: Message, context: object) -> Message:
        answer = honest(message, context)
        if answer.metadata.src_node_id == HOSTILE:
            control = answer.content.array_records["control"]
            control["scale"] = Array(np.full(1, 1e20, dtype=np.float32))
        return answer

    scaffold = replies.STRATEGIES["scaffold"]
    with pytest.raises(Divergence, match=r'Client 2 sent a reply whose "control" has norm 1e\+20, and may have '):
        replies.rounds(scaffold, "stop", app)
    weights, rows, failed = replies.rounds(scaffold, "skip", app)
    expected = replies.rounds(scaffold, "skip", absent(1))
    assert failed == 2
    assert rows == expected[1]
    assert all(torch.equal(value, expected[0][name]) for name, value in weights.items())


def test_a_mask_of_ones_own_has_the_density_asked_for() -> None:
    def app(message: Message, context: object) -> Message:
        answer = honest(message, context)
        if answer.metadata.src_node_id == HOSTILE and "mask" in answer.content.array_records:
            more = answer.content.array_records["mask"]["block.bias"].numpy() | 128
            answer.content.array_records["mask"]["block.bias"] = Array(more)
        return answer

    with pytest.raises(ClientFailure, match=r"Client 2 sent a reply whose mask updates 15 of 35 weights, not 14"):
        replies.rounds(replies.STRATEGIES["own masks"], "stop", app)


def test_replies_drawn_at_random_end_in_a_name_or_change_nothing(tmp_path: Path) -> None:
    """A few of the kinds, and of the thousands of draws of `trials/bad_inputs.py`."""
    prepared = replies.prepare(tmp_path, ("fedavg", "scaffold", "own masks", "regression, fed-em", "ridge", "evaluate"))
    for number in range(40):
        replies.attempt(prepared, random.Random(f"default-{number}"), tmp_path)


@pytest.mark.parametrize("raised", [SystemExit(0), GeneratorExit(), RecursionError(), ValueError()])
def test_an_exception_that_raises_when_it_is_read_is_still_named(raised: BaseException) -> None:
    class Unreadable(Exception):
        def __str__(self) -> str:
            raise raised

    assert named_error(Unreadable()) == "Unreadable: (text that cannot be read)"
