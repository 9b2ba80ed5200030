import pymupdf
import pytest

from jobs.show import show
from pipeline import run
from schemas.errors import ConfigError


def test_show_prints_pages_errors_and_what_was_left_out(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    document = pymupdf.open()
    for number in range(3):
        document.new_page().insert_text((72, 72), f"Page {number + 1} has words enough to be trusted as a text layer.")
    document.save(folder / "a.pdf")
    (folder / "b.pdf").write_bytes(b"")
    run(task="ocr", inputs=[str(folder)], output=str(tmp_path / "run"), local=True)
    show(str(tmp_path / "run"), chars=20, limit=2)
    printed = capsys.readouterr().out
    assert "a.pdf page 1/3  success" in printed
    assert "Page 2 has words eno..." in printed
    assert "... and 1 more pages" in printed
    assert "error: b.pdf  corrupt_input/empty" in printed


def test_show_marks_what_random_weights_wrote(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    document = pymupdf.open()
    page = document.new_page()
    page.draw_circle((200, 200), 80, fill=(0.2, 0.4, 0.9))
    document.save(folder / "a.pdf")
    run(task="caption", inputs=[str(folder)], output=str(tmp_path / "run"), local=True, model="demo")
    show(str(tmp_path / "run"), chars=200, limit=5)
    assert "[random weights, no meaning]" in capsys.readouterr().out


def test_a_folder_without_tables_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no published tables"):
        show(str(tmp_path), chars=10, limit=1)
