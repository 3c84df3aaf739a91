"""Prompt files: what they mean, and which line is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swba_infer.errors import ConfigError
from swba_infer.wan.prompts import PromptSchedule, parse_prompts, read_prompts


def test_a_prompt_holds_from_its_time_until_the_next() -> None:
    schedule = parse_prompts("# a cat\n0s: a cat sleeps\n\n  2.5s :  it wakes: and runs, fast  \n10s:rain\n")
    assert list(schedule) == [(0.0, "a cat sleeps"), (2.5, "it wakes: and runs, fast"), (10.0, "rain")]
    assert [schedule.at(t) for t in (0, 2.49, 2.5, 9.99, 10, 1e6)] == [0, 0, 1, 1, 2, 2]


def test_prompts_may_share_a_line() -> None:
    schedule = parse_prompts("0s: a cat, asleep, 5s: it wakes , 7.5s : rain, 24s of it\n9s: end")
    assert list(schedule) == [(0.0, "a cat, asleep"), (5.0, "it wakes"), (7.5, "rain, 24s of it"), (9.0, "end")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "file: expected at least one line"),
        ("# nothing\n\n", "file: expected at least one line"),
        ("a cat", "file, line 1: expected 'SECONDSs: PROMPT'.*got 'a cat'"),
        ("0: a cat", "line 1: expected 'SECONDSs"),
        ("0s a cat", "line 1: expected 'SECONDSs"),
        ("-1s: a cat", "line 1: expected 'SECONDSs"),
        ("0s: a\n1e3s: b", "line 2: expected 'SECONDSs"),
        ("0s: a\n\u0663s: b", "line 2: expected 'SECONDSs"),
        ("1s: a cat", "line 1: expected the first prompt to begin at 0s, got 1s"),
        ("0s: a\n\n5s: b\n5s: c", "line 4: expected a time after 5s, got 5s"),
        ("0s: a\n5s: b\n4s: c", "line 3: expected a time after 5s, got 4s"),
        ("0s: a\n2s: b, 1.5s: c", "line 2: expected a time after 2s, got 1.5s"),
        ("0s: a, 5s:", "line 1: expected a prompt after '5s:'"),
        ("0s: a, 5.5.5s: b", "line 1: expected 'SECONDSs: PROMPT'.*got '5.5.5s: b'"),
        ("0s: a\n5s:  ", "line 2: expected a prompt after '5s:'"),
        ("0s: a\n" + "9" * 400 + "s: b", "line 2: expected a finite number"),
    ],
)
def test_an_error_names_the_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_prompts(text, "file")


def test_files_are_utf8_and_errors_name_them(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff0s: ein B\u00e4r\r\n5s: zwei\r\n".encode())
    assert read_prompts(path).texts == ("ein B\u00e4r", "zwei")
    path.write_bytes(b"0s: \xff")
    with pytest.raises(ConfigError, match=r"UTF-8 text file, got .*prompts.txt"):
        read_prompts(path)
    with pytest.raises(ConfigError, match=r"got .*none.txt"):
        read_prompts(tmp_path / "none.txt")
    path.write_text("5s: a")
    with pytest.raises(ConfigError, match=r"prompts.txt, line 1: "):
        read_prompts(path)


def test_a_prompt_that_no_block_would_show_is_refused() -> None:
    schedule = parse_prompts("0s: a\n1s: b\n1.2s: c\n4s: d")
    schedule.check_blocks([-3, 15, 22, 30, 80], 120, fps=20)
    with pytest.raises(ConfigError, match="got none for '1s: b'"):
        schedule.check_blocks(range(0, 120, 15), 120, fps=20)
    with pytest.raises(ConfigError, match="4 s video begins, got none for '4s: d'"):
        schedule.check_blocks([-3, 15, 22, 30, 80], 80, fps=20)
    with pytest.raises(ConfigError, match="got none for '4s: d'"):
        schedule.check_blocks([-3, 15, 22, 30], 80, fps=20)


def test_blocks_of_a_thousand_years_are_checked_without_being_counted() -> None:
    frames = 10**12
    parse_prompts(f"0s: a\n{frames // 20 - 60}s: b").check_blocks(range(-3, frames, 12), frames, fps=20)
    with pytest.raises(ConfigError, match="got none for"):
        parse_prompts(f"0s: a\n{frames // 20}s: b").check_blocks(range(-3, frames, 12), frames, fps=20)


@pytest.mark.parametrize(
    ("starts", "texts"),
    [((), ()), ((0.0,), ()), ((0.0, 0.0), ("a", "b")), ((0.0,), ("",)), ((1.0,), ("a",)), ((0.0, float("nan")), "ab")],
)
def test_a_schedule_that_cannot_be_is_refused(starts: tuple[float, ...], texts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="prompts"):
        PromptSchedule(starts, texts)


@given(st.lists(st.integers(1, 10**6), unique=True, max_size=12).map(sorted), st.floats(0, 1e6))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_prompt_at_a_time_is_the_last_that_has_begun(thousandths: list[int], seconds: float) -> None:
    starts = [0.0, *(t / 1000 for t in thousandths)]
    schedule = parse_prompts("\n".join(f"{t:.3f}s: p{i}" for i, t in enumerate(starts)))
    index = schedule.at(seconds)
    assert schedule.starts[index] <= seconds
    assert all(start > seconds for start in schedule.starts[index + 1 :])
