"""The course: book/ is the source tree as it stands; a theme is an assignment, a tutorial a notebook of it."""

c = get_config()
c.CourseDirectory.course_id = "linear-lens"
c.CourseDirectory.source_directory = "book"
c.CourseDirectory.ignore = [".ipynb_checkpoints", "*.pyc", "__pycache__", "index.md"]
c.ClearSolutions.code_stub = {"python": "# Your code here.\nraise NotImplementedError"}
c.ExecutePreprocessor.timeout = 600
