"""The old spelling of `python -m pipeline lint_paper`, kept until version 0.3."""

from pipeline.papers.lint import main

if __name__ == "__main__":
    main()
