"""Steer the shipped world: feed one action at a time, look at each frame as it comes, and branch the stream.

python demos/stream_world.py --out out/demo.mp4
"""

from __future__ import annotations

import argparse

from swba_infer import VideoGenerator
from swba_infer.checkpoint import load_context
from swba_infer.video import VideoWriter


def steer(frames: int):
    """Walk ahead, and turn left and right now and then: any iterator of names or indices will do."""
    for i in range(frames):
        yield "left" if i % 40 >= 32 else "right" if i % 56 >= 50 else "forward"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="freedoom")
    parser.add_argument("--frames", type=int, default=96)
    parser.add_argument("--out", default="out/demo.mp4")
    args = parser.parse_args()

    generator = VideoGenerator.from_pretrained(args.model)
    context, actions = load_context(args.model)
    with VideoWriter(args.out, fps=generator.fps, scale=4) as video:
        for frame in generator.stream(context, actions, actions=steer(args.frames), seed=1):
            video.write(frame)

        # The stream goes on where it stands. A snapshot is a place to come back to: try a turn, then take it back.
        crossroads = generator.engine.snapshot()
        for turn in ("left", "right"):
            generator.engine.restore(crossroads)
            for frame in generator.stream(actions=[turn] * 12):
                video.write(frame)
    print(f"{video.frames} frames in {args.out}; the stream stands at frame {generator.position[0]}")


if __name__ == "__main__":
    main()
