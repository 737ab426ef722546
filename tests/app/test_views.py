"""Views of runs: what they read, and how numbers become texts."""

import json

import pytest

from app.jobs import runs
from app.jobs.ttl_cache import ttl_cached
from app.settings import own_presets
from app.views import charts, formatting, labels, run_cards
from app.views.header import header_view
from app.views.progress import progress_view
from app.views.records import ProgressView, RunCard
from app.views.samples import samples_view
from tests.browser import staged
from trainer import config
from trainer.config import presets
from trainer.runs import events, run_folder, run_requests, run_status


@pytest.fixture
def fifty_runs(outputs):
    """Finished runs, half of which were trained with a preset of the person."""
    names = [own_presets.save(f"My style {i}", config.RunConfig()) for i in range(3)]
    folders = []
    for number in range(50):
        preset = names[0] if number % 2 else "embedded-subject"
        settings = {"name": f"run {number}", "preset": preset}
        folder = run_folder.create(config.replace(config.RunConfig(), settings))
        log = events.EventLog(folder / "events.jsonl")
        log.append(events.Launched(1, "0"))
        log.append(events.StepDone(10, 0.1, 1e-4, 0.25))
        log.append(events.Finished(10, "", 10, 3.0))
        folders.append(folder)
    runs.all_runs.forget()
    run_cards._read_preset_titles.cache_clear()
    presets.load_presets()  # the presets that ship are read once per process
    return folders


@pytest.fixture
def count_calls(monkeypatch):
    """Replaces a function by one that notes its arguments in the list that is returned."""

    def replace(module, name):
        calls, function = [], getattr(module, name)

        def counted(*arguments, **options):
            calls.append(arguments)
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, counted)
        return calls

    return replace


# Speed


def test_own_presets_are_read_once_for_all_cards(fifty_runs, count_calls):
    calls = count_calls(presets, "read")
    cards = run_cards.library_view()["cards"]
    assert len(calls) == 3, "one call per own preset"
    assert {card["preset"] for card in cards} == {
        "My style 0",
        presets.load_preset("embedded-subject").title,
    }
    run_cards.library_view()
    assert len(calls) == 3, "unchanged presets are not read again"


def test_a_changed_own_preset_is_read_again(fifty_runs):
    run_cards.library_view()
    path = own_presets.folder() / "own-My-style-0.toml"
    path.write_text(path.read_text().replace("My style 0", "Another title"))
    assert "Another title" in {card["preset"] for card in run_cards.library_view()["cards"]}
    path.unlink()
    assert "Own settings" in {card["preset"] for card in run_cards.library_view()["cards"]}


def test_ended_runs_are_not_replayed_again(fifty_runs, count_calls):
    run_cards.library_view()
    calls = count_calls(run_status.Replay, "status")
    locks = count_calls(run_status, "is_alive")
    run_cards.library_view()
    assert not calls
    assert not locks


def test_an_ended_run_that_changes_is_replayed(fifty_runs):
    folder = fifty_runs[7]
    assert runs.status_without_curves(folder).state == "finished"
    run_requests.request(folder, "queued")
    assert runs.status_without_curves(folder).state == "queued"
    run_requests.withdraw(folder, "queued")
    assert runs.status_without_curves(folder).state == "finished"
    events.EventLog(folder / "events.jsonl").append(events.Failed("No memory."))
    status = runs.status_without_curves(folder)
    assert (status.state, status.message) == ("failed", "No memory.")


def test_settings_are_read_once(fifty_runs, count_calls):
    run_cards.library_view()
    calls = count_calls(config, "load")
    cards = run_cards.library_view()["cards"]
    assert not calls
    assert 'name = "run 49"' in cards[0]["settings"]


def test_a_cached_function_is_called_again_after_its_time(monkeypatch):
    clock, person, calls = [0.0], ["anna"], []
    monkeypatch.setattr("app.jobs.ttl_cache.time.monotonic", lambda: clock[0])

    @ttl_cached(2.0, key=lambda: person[0])
    def count() -> int:
        calls.append(1)
        return len(calls)

    assert [count(), count()] == [1, 1]
    person[0] = "boris"
    assert count() == 2, "each key has its own result"
    clock[0] = 2.1
    assert count() == 3
    count.forget()
    assert count() == 4


# Records


def test_views_have_the_keys_of_their_records_and_become_json(outputs):
    folder = staged.stage("maya", 100)
    staged.finish(folder)
    runs.all_runs.forget()
    progress = progress_view()
    only_during_training = {"images", "rate", "memory", "memory_of", "use"}
    assert set(progress) == set(ProgressView.__annotations__) - only_during_training
    (card,) = run_cards.library_view()["cards"]
    assert set(card) == set(RunCard.__annotations__)
    for view in (progress, card, charts.curve_view(), samples_view(), header_view("CPU")):
        json.dumps(view, allow_nan=False)


def test_views_without_runs_are_empty(outputs):
    runs.all_runs.forget()
    assert progress_view() == {}
    assert charts.curve_view() == {}
    assert charts.learned_view() == {}
    assert samples_view() == {}
    assert header_view("CPU") == {"device": "CPU", "text": "Idle", "tone": "quiet"}


# Texts and curves


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.2, "1 s"),
        (99, "99 s"),
        (100, "2 min"),
        (5970, "1 h 40 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations(seconds, text):
    assert formatting.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, ""), (3_000, "3 kB"), (99_999, "100 kB"), (100_000, "0.1 MB"), (1.2e9, "1.2 GB")],
)
def test_file_sizes(count, text):
    assert formatting.file_size(count) == text


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (31_200, "31 k"), (12_800_000, "12.8 M")]
)
def test_numbers_are_short(number, text):
    assert formatting.short_number(number) == text


def test_a_thinned_curve_has_the_means_of_neighbours():
    points = [(step, float(step)) for step in range(1, 11)]
    assert charts.thin(points, 5) == [(2, 1.5), (4, 3.5), (6, 5.5), (8, 7.5), (10, 9.5)]
    assert charts.thin(points, 4) == [(3, 2.0), (6, 5.0), (9, 8.0), (10, 10.0)]
    assert charts.thin([], 4) == []


def test_a_smoothed_curve_is_not_pulled_to_its_first_value():
    constant = [(step, 0.3) for step in range(50)]
    assert [value for _, value in charts.smooth(constant)] == pytest.approx([0.3] * 50)
    # Window of 2 steps: each value has half the weight of the next one.
    assert charts.smooth([(1, 0.0), (2, 3.0), (3, 3.0)])[1:] == [
        (2, 2.0),
        (3, pytest.approx(18 / 7)),
    ]


def test_only_the_next_run_of_an_idle_queue_is_starting(outputs):
    first, second = (run_folder.create(config.RunConfig(name=name)) for name in ("a", "b"))
    for folder in (first, second):
        run_requests.request(folder, "queued")
    runs.active.forget()
    assert labels.state_label(first, runs.status(first)) == "Starting"
    assert labels.state_label(second, runs.status(second)) == "Waiting"
