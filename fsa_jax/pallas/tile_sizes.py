"""How tiles are cut: plain integers, for plans that are made where no kernel is loaded."""

#: Above every rank and every number of a block or an entry: all of them are int32.
LARGEST = 2**31 - 1


def next_power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`; Triton's tiles have no other sizes."""
    return 1 << max(size - 1, 0).bit_length()


def tile_width(width: int) -> int:
    """Columns of a tile that holds `width`; matrix units take at least 16."""
    return max(16, next_power_of_two(width))


def cut_width(width: int, most: int) -> list[tuple[int, int]]:
    """Cuts `width` columns into tiles (start, size) of at most `most`.

    Tiles are powers of two from 16 on, so that little is padded: 80 is 64 + 16, not 128.
    """
    tiles, start = [], 0
    while start < width:
        left = width - start
        size = tile_width(left)
        if size - left >= 16:  # a smaller tile and another one after it pad less
            size //= 2
        size = min(most, size)
        tiles.append((start, size))
        start += size
    return tiles
