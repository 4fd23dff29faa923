"""The old spelling of `python -m pipeline scaffold`, kept until version 0.3."""

from pipeline.papers.scaffold import main

if __name__ == "__main__":
    main()
