"""Print the end of a headline report from its summary: python ci/result.py runs/.../summary.json"""

import json
import sys
from pathlib import Path

from chunk_grpo_nb.analysis.headline import result_lines

if __name__ == "__main__":
    print(*result_lines(json.loads(Path(sys.argv[1]).read_text())), sep="\n")
