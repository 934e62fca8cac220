"""Arithmetic of tile sizes on plain integers, for plans, which must not import kernels."""

#: Greater than every rank and every block or entry number, all of which are int32.
LARGEST = 2**31 - 1


def next_power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`; Triton tiles must have such sizes."""
    return 1 << max(size - 1, 0).bit_length()


def tile_width(width: int) -> int:
    """Columns of a tile that holds `width` columns; matrix units need at least 16."""
    return max(16, next_power_of_two(width))


def cut_width(width: int, most: int) -> list[tuple[int, int]]:
    """Splits `width` columns into tiles (start, size) of at most `most` columns.

    Tile sizes are powers of two of at least 16, chosen to pad little: 80 is 64 + 16, not 128.
    """
    tiles, start = [], 0
    while start < width:
        left = width - start
        size = tile_width(left)
        if size - left >= 16:  # a smaller tile followed by another one needs less padding
            size //= 2
        size = min(most, size)
        tiles.append((start, size))
        start += size
    return tiles
