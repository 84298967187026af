"""Mistakes in a configuration, each with the error message that its reader should see."""

MODELS = "tests.deploy.user_models"
GOOD_ARGS = "args = { inputs = 1, outputs = 1, hidden = [8] }"
BUILD = 'build = "trainers.models:mlp"'
LEARNERS = "tests.deploy.user_learners"
REAL = f'y = "real"\ny_shape = [1]\n[model]\n{BUILD}\n{GOOD_ARGS}\nloss = "mse"'
CLASSES = f'y = "class"\nways = 3\n[model]\n{BUILD}\n{GOOD_ARGS}\nloss = '
FAST = '[[learner]]\nkind = "ftml"\n[[learner]]\nkind = "ftml"\nname = "fast"'

MISTAKES: dict[str, tuple[str, str, str]] = {
    # name: (text in the file, its replacement, the error message after the file's name)
    "section": ("[meta]", "[meat]", "there is no section [meat]: did you mean 'meta'? known: checkpoint, engine,"),
    "key": ("batch = 2", "bach = 2", "[meta] has no key 'bach': did you mean 'batch'? known: batch, clip_norm,"),
    "deep key": ("[serve]", "[serve]\nlimits = { backlogg = 1 }", "[serve.limits] has no key 'backlogg': did you mean"),
    "key of no section": (
        "[run]",
        "seed = 1\n[run]",
        "seed = 1 stands in no section: put it below one of [run], [task]",
    ),
    "text for number": ("batch = 2", 'batch = "2"', "[meta] batch = '2': must be a whole number"),
    "bool for number": ("batch = 2", "batch = true", "[meta] batch = true: must be a whole number"),
    "fraction for number": ("batch = 2", "batch = 2.5", "[meta] batch = 2.5: must be a whole number"),
    "number for text": (BUILD, "build = 3", "[model] build = 3: must be a string"),
    "number for list": ("x_shape = [1]", "x_shape = 1", "[task] x_shape = 1: must be a list"),
    "too small": ("batch = 2", "batch = 0", "[meta] batch = 0: must be at least 1"),
    "not above zero": ("batch = 2", "lr = 0.0", "[meta] lr = 0.0: must be greater than 0"),
    "infinite": ("batch = 2", "lr = inf", "[meta] lr = inf: must be a finite number"),
    "NaN": (GOOD_ARGS, "args = { inputs = nan }", "[model.args] inputs = nan: must be a finite number"),
    "inside a list": ("y_shape = [1]", "y_shape = [1, 0]", "[task] y_shape[1] = 0: must be at least 1"),
    "a size of none": ("x_shape = [1]", "x_shape = [1, 0]", "[task] x_shape is (1, 0); it must be whole numbers of 1"),
    "a size below any": ("x_shape = [1]", "x_shape = [1, -2]", "[task] x_shape[1] = -2: must be at least -1"),
    "choice": ('y = "real"', 'y = "reel"', "[task] y = 'reel': must be 'class' or 'real'"),
    "no path": ('path = "', 'seed = 1 # "', '[run] path is missing, for example path = "runs/first"'),
    "no build": (BUILD, "", '[model] build is missing, for example build = "trainers.models:mlp"'),
    "class without ways": ('y = "real"\ny_shape = [1]', 'y = "class"', "[task] ways is None; y = 'class' needs the"),
    "rule": ("[inner]", '[inner]\nrule = "sdg"', "[inner] rule = 'sdg': did you mean 'sgd'? known: "),
    "rule option": ("[inner]", "[inner]\noptions = { beta = 1 }", "[inner.options] has no key 'beta': it takes none"),
    "glob": ("[inner]", '[inner]\nfast = "head.*"', "[inner] fast = 'head.*' matches none of the weights"),
    "gradient": ("batch = 2", 'gradient = "exakt"', "[meta] gradient = 'exakt': did you mean 'exact'? known: "),
    "replay": ("batch = 2", 'replay = "uniformly"', "[meta] replay = 'uniformly': did you mean 'uniform'?"),
    "optimizer": ("batch = 2", 'optimizer = "adm"', "[meta] no optimizer is called 'adm': did you mean 'adam'?"),
    "engine": ("[serve]", '[engine]\nkind = "lokal"\n[serve]', "[engine] kind = 'lokal': did you mean 'local'?"),
    "processes of the local engine": (
        "[serve]",
        "[engine]\nprocesses = 2\n[serve]",
        "[engine] processes = 2: the local engine is a single process without shards; set kind = 'deepspeed'",
    ),
    "what deterministic ranks cannot do": (
        "[serve]",
        '[engine]\nkind = "deepspeed"\ndeterministic = true\n[serve]',
        "[engine] batching = 'auto' with deterministic = true: the order of the sum would depend on the number of",
    ),
    "several machines on a network that nobody calls private": (
        "[serve]",
        '[engine]\nkind = "deepspeed"\nnodes = [1, 2]\nrendezvous = "127.0.0.1:29400"\n[serve]',
        (
            "[engine] nodes = [1, 2]: ranks on several machines neither authenticate nor encrypt anything, so whoever "
            "reaches their ports can run code on every machine of the run. If only these machines can reach "
            "127.0.0.1:29400 and each other, set trusted_network = true"
        ),
    ),
    "machines that meet at every address": (
        "[serve]",
        '[engine]\nkind = "deepspeed"\nnodes = [1, 2]\nrendezvous = "0.0.0.0:29400"\ntrusted_network = true\n[serve]',
        "[engine] rendezvous = '0.0.0.0:29400' is every address of this machine: name the one on the private network",
    ),
    "machines that meet at the address of another one": (
        "[serve]",
        (
            '[engine]\nkind = "deepspeed"\nnodes = [1, 2]\nrendezvous = "203.0.113.7:29400"\ntrusted_network = true\n'
            "[serve]"
        ),
        "[engine] rendezvous = '203.0.113.7:29400': 203.0.113.7 is not an address of this machine, which hosts the",
    ),
    "stage": ("[serve]", '[engine]\nkind = "deepspeed"\nzero_stage = 4\n[serve]', "[engine] zero_stage = 4"),
    "device": (
        "[serve]",
        '[engine]\ndevice = "gpu"\n[serve]',
        "[engine] device = 'gpu': RuntimeError: Expected one of",
    ),
    "loss": ('loss = "mse"', 'loss = "mce"', "[model] no loss is called 'mce': did you mean 'mse'?"),
    "no import path": (BUILD, 'build = "trainers.models.mlp"', "is no import path: write it as 'package.module:name'"),
    "no module": (BUILD, 'build = "trayners:mlp"', "[model] 'trayners:mlp' cannot be imported: No module named"),
    "no builder": (BUILD, 'build = "trainers.models:mpl"', "trainers.models has no 'mpl': did you mean mlp"),
    "model argument": (GOOD_ARGS, "args = { input = 1 }", "model.args {'input': 1} do not fit trainers.models:mlp:"),
    "no model": (BUILD + "\n" + GOOD_ARGS, 'build = "builtins:dict"', "builtins:dict returned a dict, not a torch.nn."),
    "model raises": (BUILD + "\n" + GOOD_ARGS, f'build = "{MODELS}:raises"', "[model] KeyError: 'no such layer'"),
    "output": (
        "outputs = 1",
        "outputs = 3",
        "of shape (4, 3) for 4 samples, which does not fit [task] y_shape = (1,): mse: the output has ",
    ),
    "input": (
        "inputs = 1",
        "inputs = 7",
        "[model] trainers.models:mlp with loss 'mse' does not accept a task of x_shape",
    ),
    "input of any size": (
        "x_shape = [1]",
        "x_shape = [-1]",
        "does not accept a task of x_shape (-1,) (tried with 32 for each -1), x_dtype float32",
    ),
    "loss of classes": (
        'loss = "mse"',
        'loss = "cross_entropy"',
        "'cross_entropy' is for classes, but [task] y = 'real'",
    ),
    "outcome of twice as many numbers": (
        'loss = "mse"',
        'loss = "gaussian"',
        (
            "[model] trainers.models:mlp gives an output of shape (4, 1) for 4 samples, which does not fit [task] "
            "y_shape = (1,): gaussian: the output has shape (4, 1) and y (4, 1): it needs 'mean' and 'scale' of the"
        ),
    ),
    "outcome of fewer numbers": (
        GOOD_ARGS + '\nloss = "mse"',
        GOOD_ARGS.replace("outputs = 1", "outputs = 2") + '\nloss = "bernoulli"',
        "y_shape = (1,): bernoulli: the output has shape (4, 2) and y (4, 1): it needs an output of the shape of y, (4",
    ),
    "outcome of classes": (
        'loss = "mse"',
        'loss = "categorical"',
        "[model] loss = 'categorical' is for classes, but [task] y = 'real': use a loss of numbers, such as 'mse' or",
    ),
    "outcome of counts for classes": (
        REAL,
        CLASSES + '"poisson"',
        (
            "[model] loss = 'poisson' is for numbers, but [task] y = 'class': use 'cross_entropy' or 'categorical', or "
            "set y = 'real'"
        ),
    ),
    "squared error of classes": (
        REAL,
        CLASSES + '"mse"',
        "does not fit [task] y = 'class', ways = 3: mse: the output has shape (4, 1) and y (4,): it needs an output of",
    ),
    "too few classes": (
        REAL,
        CLASSES + '"categorical"',
        "gives an output of shape (4, 1) for 4 samples; [task] ways = 3 needs (n, 3)",
    ),
    "learner without a state": (
        "[serve]",
        f'[[learner]]\nkind = "{LEARNERS}:Stateless"\n[serve]',
        (
            '[learner 1 "Stateless"] Stateless cannot answer: Stateless has no state: state() returns named '
            "tensors, and answers(state, support, x) a prediction for each x, under the key ''"
        ),
    ),
    "learner without an answer of its own": (
        "[serve]",
        f'[[learner]]\nkind = "ftml"\n[[learner]]\nkind = "{LEARNERS}:Nameless"\n[serve]',
        "[learner 2 \"Nameless\"] Nameless cannot answer: answers() returns a dict of 'mean': tuple: state() returns",
    ),
    "learner that answers for too few samples": (
        "[serve]",
        f'[[learner]]\nkind = "{LEARNERS}:Short"\n[serve]',
        (
            "Short cannot answer: an answer has outputs of shapes {'outputs': (1, 3, 1)} for 1 log_weights and 4 "
            "samples: each is (1, 4, ...)"
        ),
    ),
    "learner with unnormalised weights": (
        "[serve]",
        f'[[learner]]\nkind = "{LEARNERS}:Unnormalised"\n[serve]',
        "Unnormalised cannot answer: the weights of an answer sum to 2: subtract logsumexp from log_weights, so that",
    ),
    "learner that answers differently each time": (
        "[serve]",
        f'[[learner]]\nkind = "{LEARNERS}:Impure"\n[serve]',
        "Impure cannot answer: another answer follows from the same state and support set: answers() is a pure funct",
    ),
    "leader that believes in no parameters": (
        "[serve]",
        (
            '[[source]]\nkind = "samples"\npath = "x.jsonl"\nx = ["x"]\ny = ["y"]\nchange = "loss_jump"\n'
            f'likelihood = "leader"\n[[learner]]\nkind = "{LEARNERS}:Constant"\n[serve]'
        ),
        (
            "[[source]] samples: likelihood = 'leader' needs a learner that answers by parameters of the model, and "
            "'Constant' does not: name another one in [serve] answers"
        ),
    ),
    "loss of all pairs": (
        BUILD + "\n" + GOOD_ARGS + '\nloss = "mse"',
        f'build = "{MODELS}:Squeezed"\nloss = "torch.nn.functional:huber_loss"',
        "Squeezed: the loss (huber_loss) compares element by element, but the output has shape (4,) and the targ",
    ),
    "hand-written loss of all pairs": (
        BUILD + "\n" + GOOD_ARGS + '\nloss = "mse"',
        f'build = "{MODELS}:Squeezed"\nloss = "{MODELS}:squared"',
        "Squeezed: the loss compares an output of shape (4,) with targets of shape (4, 1) in all pairs of their s",
    ),
    "class of a loss": (
        'loss = "mse"',
        'loss = "torch.nn:HuberLoss"',
        "[model] the loss is the class HuberLoss: give a function of (output, y), or an instance",
    ),
    "surrogate": (
        GOOD_ARGS,
        GOOD_ARGS + '\nsurrogate = ["act"]',
        "[model] surrogate = 'act' matches none of the model's layers",
    ),
    "frozen row": (
        GOOD_ARGS,
        GOOD_ARGS + '\nfrozen_rows = { "1.weight" = [8] }',
        "[model] frozen_rows: 1.weight has 8 rows, so there is no row 8",
    ),
    "row with a gradient": (
        GOOD_ARGS,
        GOOD_ARGS + '\nfrozen_rows = { "1.weight" = [0, 1, 2] }',
        "frozen_rows: the rows [0, 1, 2] of 1.weight have a gradient, so they are learned",
    ),
    "another model": (
        BUILD + "\n" + GOOD_ARGS,
        f'build = "{MODELS}:Copied"',
        "Copied: the loss does not compute what the model does (off by ",
    ),
    "frozen batch norm": (
        BUILD + "\n" + GOOD_ARGS,
        f'build = "{MODELS}:frozen_statistics"',
        "the layer '1' (BatchNorm1d) is frozen, but keeps running statistics, which a pure function of the weights can",
    ),
    "batch norm": (
        BUILD + "\n" + GOOD_ARGS,
        f'build = "{MODELS}:running_statistics"',
        "the layer '1' (BatchNorm1d) kee",
    ),
    "random outside of layers": (
        BUILD + "\n" + GOOD_ARGS,
        f'build = "{MODELS}:Unseeded"',
        "[model] tests.deploy.user_models:Unseeded: repeated calls give different losses: the model itself",
    ),
    "weight normalisation": (
        BUILD + "\n" + GOOD_ARGS,
        f'build = "{MODELS}:weight_normed"',
        "[model] tests.deploy.user_models:weight_normed: the layer '0' (ParametrizedLinear) is under weight normal",
    ),
    "detached": (
        BUILD + "\n" + GOOD_ARGS,
        f'build = "{MODELS}:Detached"',
        "Detached: the gradient of the model itself (Detached) is not its slope: its forward uses .detach(), behind",
    ),
    "in place": (
        BUILD + "\n" + GOOD_ARGS,
        f'build = "{MODELS}:InPlace"',
        "InPlace: a tensor that the gradient needs is edited in place: the model itself (InPlace) does so by mul_;",
    ),
    "checkpoint": (
        BUILD + "\n" + GOOD_ARGS,
        f'build = "{MODELS}:Checkpointed"',
        "Checkpointed: the layer 'layer' (Linear) is computed again while going back (torch.utils.checkpoint), with",
    ),
    "deaf": (
        BUILD + "\n" + GOOD_ARGS,
        f'build = "{MODELS}:Deaf"',
        "no weight of tests.deploy.user_models:Deaf has a m",
    ),
    "endless": (
        BUILD + "\n" + GOOD_ARGS,
        f'build = "{MODELS}:Endless"',
        "on a synthetic task is nan: it must be finite",
    ),
    "optimizer option": (
        "batch = 2",
        "optimizer_options = { beta = 0.9 }",
        "[meta] optimizer_options has no key 'beta' for 'adam': did you mean 'betas'? known: amsgrad,",
    ),
    "parameter groups": (
        "batch = 2",
        "optimizer_options = { groups = {} }",
        "[meta] optimizer_options.groups: all meta-parameters have one learning rate and one weight decay. To leave",
    ),
    "learners in one table": (
        "[serve]",
        '[learner]\nkind = "ftml"\n[serve]',
        'write each learner as a table of its own: [[learner]], then kind = "ftml"',
    ),
    "no kind of learner": ("[serve]", '[[learner]]\nname = "a"\n[serve]', "[learner 1] kind is missing: known: aruba,"),
    "kind of learner": (
        "[serve]",
        '[[learner]]\nkind = "ftlm"\n[serve]',
        "[learner 1] kind = 'ftlm': did you mean 'ftml'? known: aruba, ",
    ),
    "key of a learner": (
        "[serve]",
        '[[learner]]\nkind = "ftml"\nlr = 0.1\n[serve]',
        "[learner 1] has no key 'lr': known: inner, kind, meta, name, options",
    ),
    "name of a learner": (
        "[serve]",
        '[[learner]]\nkind = "ftml"\nname = "ftml@10"\n[serve]',
        "[learner 1 \"ftml@10\"] name = 'ftml@10': must be letters, digits, '.', '_' or '-', such as 'fast'",
    ),
    "name of another kind": (
        "[serve]",
        '[[learner]]\nkind = "ftml"\nname = "moml"\n[serve]',
        "[learner 1 \"moml\"] name = 'moml' is the name of another kind than 'ftml'",
    ),
    "name of a comparator": (
        "[serve]",
        '[[learner]]\nkind = "ftml"\nname = "hindsight"\n[serve]',
        "[learner 1 \"hindsight\"] name = 'hindsight' is the name of a comparator: take another one",
    ),
    "learners of one name": (
        "[serve]",
        '[[learner]]\nkind = "ftml"\n[[learner]]\nkind = "ftml"\n[serve]',
        "[[learner]] two are called 'ftml': give one another name",
    ),
    "baseline that is a learner": (
        "[serve]",
        '[[learner]]\nkind = "ftml"\n[[learner]]\nkind = "from_scratch"\n[serve]',
        "[regret] baselines = 'from_scratch': a [[learner]] has this name already",
    ),
    "key of a learner's meta": (
        "[serve]",
        f"{FAST}\n[learner.meta]\nlrr = 0.1\n[serve]",
        "[learner 2 \"fast\"] meta has no key 'lrr': did you mean 'lr'? known: batch, ",
    ),
    "range of a learner's rate": (
        "[serve]",
        f"{FAST}\n[learner.meta]\nlr = 0.0\n[serve]",
        '[learner 2 "fast"] meta.lr = 0.0: must be greater than 0',
    ),
    "type of a learner's rate": (
        "[serve]",
        f'{FAST}\n[learner.meta]\nlr = "0.1"\n[serve]',
        "[learner 2 \"fast\"] meta.lr = '0.1': must be a number",
    ),
    "a learner's meta is no table": (
        "[serve]",
        f"{FAST}\nmeta = 3\n[serve]",
        '[learner 2 "fast"] meta = 3: it must be a table, [learner.meta]',
    ),
    "rule of a learner": (
        "[serve]",
        f'{FAST}\n[learner.inner]\nrule = "sdg"\n[serve]',
        "[learner 2 \"fast\"] inner.rule = 'sdg': did you mean 'sgd'? known: ",
    ),
    "option of a learner's rule": (
        "[serve]",
        f'{FAST}\n[learner.inner]\nrule = "momentum"\noptions = {{ momentun = 0.5 }}\n[serve]',
        "[learner 2 \"fast\"] inner.options has no key 'momentun': did you mean 'momentum'?",
    ),
    "glob of a learner": (
        "[serve]",
        f'{FAST}\n[learner.inner]\nfast = "head.*"\n[serve]',
        "[learner 2 \"fast\"] fast = 'head.*' matches none of the weights",
    ),
    "optimizer of a learner": (
        "[serve]",
        f'{FAST}\n[learner.meta]\noptimizer = "adm"\n[serve]',
        "[learner 2 \"fast\"] no optimizer is called 'adm': did you mean 'adam'?",
    ),
    "option of a learner": (
        "[serve]",
        f"{FAST}\n[learner.options]\nsteps = 3\n[serve]",
        "[learner 2 \"fast\"] options has no key 'steps': it takes none",
    ),
    "key of the run in a learner": (
        "[serve]",
        f"{FAST}\n[learner.meta]\nmax_skipped = 3\n[serve]",
        '[learner 2 "fast"] meta.max_skipped counts for the whole run: set it in [meta]',
    ),
    "two ways to step": (
        "[serve]",
        (
            '[[learner]]\nkind = "ftml"\n[[learner]]\nkind = "online_reptile"\nmeta = { lr = 0.1 }\n'
            "options = { lr = 0.2 }\n[serve]"
        ),
        '[learner 2 "online_reptile"] meta.lr and options both say how to step: keep one of them',
    ),
    "number of answer steps": (
        "[inner]",
        "[inner]\nanswer_steps = [2, -1]",
        "[inner] answer_steps[1] = -1: must be at least 0",
    ),
    "type of answer steps": (
        "[inner]",
        '[inner]\nanswer_steps = "2"',
        "[inner] answer_steps[0] = '2': must be a whole",
    ),
    "rule of an answer": (
        "[inner]",
        '[inner]\nanswer_heads = ["ridge"]',
        "[inner] answer_heads = 'ridge': did you mean 'ridge_head'? known: ",
    ),
    "posterior": (
        "[inner]",
        '[inner]\nposterior = "pont"',
        "[inner] posterior = 'pont': did you mean 'point'? known: ",
    ),
    "option of a posterior": (
        "[inner]",
        "[inner]\nposterior_options = { width = 1 }",
        "[inner.posterior_options] has no key 'width': it takes none",
    ),
    "posterior of a rule that draws nothing": (
        "[inner]",
        '[inner]\nposterior = "samples"\nsamples = 2',
        '[inner] ftml cannot answer: posterior = "samples" needs a rule that draws by key',
    ),
    "particles of a rule without them": (
        "[inner]",
        '[inner]\nposterior = "particles"',
        '[inner] ftml cannot answer: posterior = "particles" needs a rule that adapts several models',
    ),
    "number of particles": (
        "[inner]",
        '[inner]\nrule = "svgd"\noptions = { particles = 3 }\nposterior = "particles"\nsamples = 2',
        "[inner] ftml cannot answer: samples is 2, but the rule has 3 particles: set samples = 3",
    ),
    "curvature of many weights": (
        'hidden = [8] }\nloss = "mse"\n\n[inner]\n',
        'hidden = [80, 40] }\nloss = "mse"\n[inner]\nposterior = "laplace"\nsamples = 2\n',
        '[inner] ftml cannot answer: curvature = "full" is a matrix of 3,441 x 3,441 numbers',
    ),
    "curvature in a meta-gradient": (
        "batch = 2",
        'batch = 2\ngradient = "laplace"\noptions = { curvature = "half" }',
        "[meta.options] curvature = 'half': must be",
    ),
    "curvature of many weights in a meta-gradient": (
        'hidden = [8] }\nloss = "mse"\n\n[inner]\nsteps = 2\n[meta]\n',
        'hidden = [80, 40] }\nloss = "mse"\n[meta]\ngradient = "laplace"\n',
        "[meta] gradient = 'laplace': curvature = \"full\" is a matrix of 3,441 x 3,441 numbers",
    ),
    "a rule that a meta-gradient does not take": (
        "batch = 2",
        'batch = 2\ngradient = "implicit"',
        "[meta] the inner rule does not pull back to its start",
    ),
    "two priors of a posterior": (
        "[inner]",
        '[inner]\nrule = "proximal"\nposterior = "laplace"\nposterior_options = { strength = 2.0 }',
        "[inner] ftml cannot answer: Laplace's approximation is to have a prior of strength = 2, and the inner rule",
    ),
    "two priors of a meta-gradient": (
        "[inner]\nsteps = 2\n[meta]",
        '[inner]\nsteps = 2\nrule = "proximal"\n[meta]\ngradient = "laplace"\noptions = { strength = 2.0 }',
        "[meta] Laplace's approximation is to have a prior of strength = 2, and the inner rule has one of its own",
    ),
    "samples of a point": (
        "[serve]",
        f"{FAST}\n[learner.inner]\nsamples = 2\n[serve]",
        '[learner 2 "fast"] fast cannot answer: samples is 2: posterior = "point" has 1 sample',
    ),
    "beginning": ("[inner]", '[inner]\nbegin = "cold"', "[inner] begin = 'cold': must be 'weights' or 'fresh'"),
    "loss option": (
        'loss = "mse"',
        'loss = "mse"\nloss_options = { sigma = 1.0 }',
        "[model] the options {'sigma': 1.0} do not fit the loss 'mse': ",
    ),
    "no such answer": (
        "[serve]",
        '[serve]\nanswers = "ftml@7"',
        "[serve] answers = 'ftml@7': nobody gives this answer; did you mean 'ftml@5'? known: from_scratch, ftml",
    ),
    "nobody answers": (
        "[serve]",
        '[serve]\nanswers = "ftlm"',
        "[serve] answers = 'ftlm': no learner has this name; did you mean 'ftml'? known: from_scratch, ftml",
    ),
    "baseline": ('["from_scratch"]', '["scratch"]', "[regret] baselines = 'scratch': did you mean 'from_scratch'?"),
    "baseline is learner": ('["from_scratch"]', '["ftml"]', "[regret] baselines = 'ftml' is the learner that the"),
    "baseline twice": ('["from_scratch"]', '["from_scratch", "from_scratch"]', "names 'from_scratch' more than once"),
    "baseline option": ("steps = 2 }", "stepz = 2 }", "[regret.options.from_scratch] has no key 'stepz': did you mean"),
    "baseline option's type": (
        "{ steps = 2 }",
        '{ steps = "2" }',
        "[regret.options.from_scratch] steps = '2': must be a",
    ),
    "options of nothing": ("options.from_scratch", "options.scratch", "[regret] options = 'scratch': did you mean"),
    "no closed form": (
        "every_rounds = 5\nh",
        'comparator = "closed_form"\nh',
        "[regret] comparator = 'closed_form': f(U(w)) is not quadratic in the weights: at a random point it is",
    ),
    "comparator": ("every_rounds = 5\nh", 'comparator = "hindsite"\nh', "[regret] comparator = 'hindsite': did you"),
    "source kind": ("[serve]", '[[source]]\nkind = "htp"\n[serve]', "[source 1] kind = 'htp': did you mean 'http'?"),
    "no source kind": ("[serve]", '[[source]]\nname = "a"\n[serve]', "[source 1] kind is missing: known: "),
    "source name": (
        "[serve]",
        '[[source]]\nkind = "http"\nname = "a b"\n[serve]',
        "[source 1] name = 'a b': must be le",
    ),
    "source option": (
        "[serve]",
        '[[source]]\nkind = "sinusoid"\ntask = 1\n[serve]',
        "[source 1] has no key 'task': did",
    ),
    "source option's range": (
        "[serve]",
        '[[source]]\nkind = "sinusoid"\ntasks = 0\n[serve]',
        "[source 1] tasks = 0: mu",
    ),
    "source option missing": ("[serve]", '[[source]]\nkind = "files"\n[serve]', "[source 1] folder is missing"),
    "one source table": (
        "[serve]",
        '[source]\nkind = "http"\n[serve]',
        "write each source as a table of its own: [[so",
    ),
    "same source name": ("[serve]", '[[source]]\nkind = "http"\n' * 2 + "[serve]", "two are called 'http': give one"),
    "source of others": (
        "[serve]",
        '[[source]]\nkind = "rainbow_digits"\n[serve]',
        "generates tasks with x_shape = (3, 28,",
    ),
    "source not there": (
        "[serve]",
        '[[source]]\nkind = "files"\nfolder = "/no"\n[serve]',
        "[[source]] files: /no: there is no such folder: create it",
    ),
    "exposed": (
        "[serve]",
        '[serve]\nhost = "0.0.0.0"',
        "[serve] host = '0.0.0.0' can be reached from other machines: set tls_c",
    ),
    "exposed everywhere": ("[serve]", '[serve]\nhost = ""', "[serve] host = '' can be reached from other machines"),
    "no token file": ("[serve]", '[serve]\ntoken_file = "/no"', "[serve] token_file /no cannot be read: No such file"),
    "key without certificate": ("[serve]", '[serve]\ntls_key = "/no"', "[serve] tls_cert and tls_key go together"),
    "no certificate": ("[serve]", '[serve]\ntls_cert = "/no"\ntls_key = "/no"', "[serve] tls_cert /no cannot be read"),
    "not TOML": ("[run]", "[run", "is not TOML: Expected ']'"),
}

COMPARE_MISTAKES: dict[str, tuple[str, int, str]] = {
    # name: (arguments of `online-meta compare`, the exit code, the error message); {folder} has slow.toml and run/
    "no configuration": ("{folder}/run", 64, "Missing argument 'CONFIG...'"),
    "no history there": ("{folder}/none {folder}/slow.toml", 78, "{folder}/none: there is no history here"),
    "the configuration first": (
        "{folder}/slow.toml {folder}/run",
        64,
        "{folder}/slow.toml is a file: name the folder of a history first, then the configurations",
    ),
    "an empty history": ("{folder}/empty {folder}/slow.toml", 75, "has 0 rounds, but at least 1 were requested"),
    "more rounds than there are": (
        "{folder}/run {folder}/slow.toml --rounds 99",
        75,
        "{folder}/run/history has 52 rounds, but 99 were requested",
    ),
    "no job": ("{folder}/run {folder}/slow.toml --jobs 0", 64, "'--jobs': 0 is not in the range x>=1"),
    "no seed": ("{folder}/run {folder}/slow.toml --seeds 0", 64, "'--seeds': 0 is not in the range x>=1"),
    "no round": ("{folder}/run {folder}/slow.toml --rounds 0", 64, "'--rounds': 0 is not in the range x>=1"),
    "a configuration that is not there": (
        "{folder}/run {folder}/no.toml",
        78,
        "error: no, seeds 0, 1, 2: {folder}/no.toml cannot be read: No such file or directory",
    ),
    "a wrong key": (
        "{folder}/run {folder}/slow.toml --set meta.bach=2",
        78,
        "error: slow, seeds 0, 1, 2: {folder}/slow.toml: [meta] has no key 'bach': did you mean 'batch'?",
    ),
    "an override that is none": ("{folder}/run {folder}/slow.toml --set lr", 78, "--set 'lr': write it as section.key"),
    "other tasks": (
        "{folder}/run {folder}/slow.toml --seeds 1 --set task.x_shape=[2]",
        78,
        (
            "error: slow, seed 0: {folder}/slow.toml: [task] x_shape = (2,), but the tasks in {folder}/run/history "
            "have (1,): only a configuration with these can play them again"
        ),
    ),
}
