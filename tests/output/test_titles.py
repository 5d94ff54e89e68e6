"""Titles that are changed after a run: they reach the card and the report, and what the card's owner wrote stays."""

from pathlib import Path

from tests.conftest import WriteConfig, digests, fgsm, generate, manifest


def test_a_title_that_was_changed_reaches_the_card_and_the_report(write_config: WriteConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert fgsm("generate", write_config(output={"title": "Old photos"}, model={"title": "Old net"})).exit_code == 0
    before, run_id = digests(out), manifest(out)["run_id"]
    with (out / "README.md").open("a") as card:
        card.write("\nThanks to Ian.\n")
    config = write_config(output={"title": "New photos"}, model={"title": "New net"})
    assert fgsm("generate", config).exit_code == 0
    for name in ("README.md", "report.html"):
        text = (out / name).read_text()
        assert [title in text for title in ("New photos", "New net", "Old photos", "Old net")] == [
            True,
            True,
            False,
            False,
        ]
    assert (out / "README.md").read_text().endswith("\nThanks to Ian.\n")
    assert (digests(out), manifest(out)["run_id"]) == (before, run_id)
    assert fgsm("verify", out).exit_code == 0
    assert "All 3 shards are already there" in generate(config)


def test_lines_of_the_owner_stay_where_they_read_like_the_title(write_config: WriteConfig, tmp_path: Path) -> None:
    card = tmp_path / "out/README.md"
    generate(write_config(output={"title": "Intro"}))
    card.write_text(f"{card.read_text()}\n# Intro\n\nBy Ian.\n")
    generate(write_config(output={"title": "Photos"}))
    assert [line for line in card.read_text().splitlines() if line in ("# Photos", "# Intro")] == [
        "# Photos",
        "# Intro",
    ]


def test_a_card_with_the_line_ends_of_windows_gets_its_new_title(write_config: WriteConfig, tmp_path: Path) -> None:
    card = tmp_path / "out/README.md"
    generate(write_config(output={"title": "Old photos"}))
    card.write_bytes(card.read_bytes().replace(b"\n", b"\r\n"))
    generate(write_config(output={"title": "New photos"}))
    assert b"\r\n# New photos\r\n" in card.read_bytes()
    assert b"Old photos" not in card.read_bytes()


def test_a_title_that_the_owner_has_changed_is_left_to_them(write_config: WriteConfig, tmp_path: Path) -> None:
    card = tmp_path / "out/README.md"
    generate(write_config(output={"title": "Old photos"}))
    card.write_text(card.read_text().replace("Old photos", "Photos of Ian"))
    assert "README.md has others than before" in generate(write_config(output={"title": "New photos"}))
    assert "# Photos of Ian" in card.read_text()
