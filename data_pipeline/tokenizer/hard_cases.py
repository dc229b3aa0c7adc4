"""Texts on which tokenizers tend to differ or to lose characters."""

HARD_CASES = (
    "before <|endoftext|> after <|fim_prefix|><|endofprompt|>",
    "".join(map(chr, range(0x20))) + "\x7f\x80\x85\xa0\xad",
    "   leading, trailing   \n\n\n \t\t\r\n\r\r\n  x \u3000\u2028\u2029\u200b\ufeff y",
    "don't DON'T they'Ll it’s 'tis 'S'll''ve",
    "0 12 123 1234 12345 ٣٤٥ ¹²³ ½ Ⅷ 一二三 1,000.00e-10",
    "日本語のテキスト、中文文本。한국어 텍스트 ภาษาไทย हिन्दी தமிழ் العربية עברית",
    "ÀÉÎõü ﬁﬂ ǅ ẞß İı e\u0301a\u0308\u0323 Å\u030a Ω≈ç√ ∑ § ©®™",
    "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 👍🏽 🤷🏿‍♀️ \U0001f9d1\u200d\U0001f680 \U000e0041 \U0010ffff",
    "def f(x):\n\tif x<=0 and not(y!=z):\n\t\treturn {'a':[1,2.5e-3]}  # ünï\n\n\n    }\r\n",
    "<html><body class=\"a-b_c\">&nbsp;&#x27;</body></html>\\n\\t\\\\ C:\\dir\\x /usr/lib/../a.b",
    "aAaA" * 40 + "a" * 3000 + " " * 3000 + "!" * 3000 + "\n" * 300 + "é" * 1000 + "字" * 500,
    " " * 5 + "word" + " " * 7 + "\n" + " " * 3 + "\n" + "word ",
    "how a text ends, where patterns differ \r\n \t",
    "and so \n\n  ",
)  # fmt: skip
