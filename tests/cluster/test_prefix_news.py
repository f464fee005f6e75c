"""What a door hears of a cache that others fill."""

from argosy.cluster.prefix_news import NAME_BYTES, PrefixNews


def names(*numbers: int) -> bytes:
    """Names end to end."""
    return b"".join(number.to_bytes(NAME_BYTES, "big") for number in numbers)


def test_each_name_is_told_once_to_each_who_asks() -> None:
    """Digests are longer than the names; who asks for a number that never came is told all there is."""
    news = PrefixNews()
    assert news.since(0) == (b"", 0)
    for number in (7, 8):
        news.add(names(number) + b"more of the digest")
    assert news.since(0) == (names(7, 8), 2)
    news.add(names(9))
    assert news.since(2) == (names(9), 3)
    assert news.since(3) == (b"", 3)
    assert news.since(99) == (names(7, 8, 9), 3)


def test_old_names_are_forgotten_and_numbers_go_on() -> None:
    """A door that asks late hears of the latest, and goes on from there."""
    news = PrefixNews(most_names=4)
    for number in range(1, 21):
        news.add(names(number))
        told, end = news.since(0)
        assert end == number
        assert told.endswith(names(number))
        assert min(4, number) * NAME_BYTES <= len(told) <= 8 * NAME_BYTES
    assert news.since(18) == (names(19, 20), 20)
