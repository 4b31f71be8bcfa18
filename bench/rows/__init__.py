"""What is raced, one file a part; every file here is found by itself.

    def cases(device: str, quick: bool) -> Iterable[Case]   # device: "cpu" or "cuda"
    def targets(device: str) -> Iterable[Target]            # numbers to reach, () if there are none

A new backend needs its growth in some file (a test asks for it), and one line for each race:

    yield growth("lsh(rounds=4)", time=1, memory=1, lengths=(4096, 8192, 16384))
    both = [ours("lsh(rounds=4)"), peer("reformer-pytorch", "lsh(rounds=4)")]
    yield race("forward", "float32", 4096, both)
"""
