"""The README's table of options is the configuration model's."""

from pathlib import Path

from chameleon_ray.options_table import options_table

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_readme_documents_every_option() -> None:
    begin, end = "<!-- options: python -m chameleon_ray.options_table -->\n", "<!-- end of options -->"
    table = README[README.index(begin) + len(begin) : README.index(end)]
    assert table == options_table()


def test_every_option_says_what_it_means() -> None:
    for row in options_table().splitlines()[2:]:
        assert row.rstrip("|").rpartition("|")[2].strip(), row
