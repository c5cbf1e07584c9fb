"""Works and those who made them: books, music, paintings, films, characters."""

from __future__ import annotations

from relation import Alias, Consequence, Relation, pairs

BOOKS = """
Hamlet = William Shakespeare
Pride and Prejudice = Jane Austen
Oliver Twist = Charles Dickens
War and Peace = Leo Tolstoy
Don Quixote = Miguel de Cervantes
Animal Farm = George Orwell
Crime and Punishment = Fyodor Dostoevsky
Moby-Dick = Herman Melville
The Odyssey = Homer | James Joyce
Frankenstein = Mary Shelley
Dracula = Bram Stoker
The Great Gatsby = F. Scott Fitzgerald
The Hobbit = J.R.R. Tolkien
The Divine Comedy = Dante Alighieri
The Metamorphosis = Franz Kafka
Les Misérables = Victor Hugo
The Old Man and the Sea = Ernest Hemingway
The Grapes of Wrath = John Steinbeck
Adventures of Huckleberry Finn = Mark Twain
Treasure Island = Robert Louis Stevenson
Robinson Crusoe = Daniel Defoe
Gulliver's Travels = Jonathan Swift
Alice's Adventures in Wonderland = Lewis Carroll
Brave New World = Aldous Huxley
The Picture of Dorian Gray = Oscar Wilde
To Kill a Mockingbird = Harper Lee
The Catcher in the Rye = J.D. Salinger
The War of the Worlds = H.G. Wells
Ulysses = James Joyce | Homer
Romeo and Juliet = William Shakespeare
A Tale of Two Cities = Charles Dickens
Anna Karenina = Leo Tolstoy
Macbeth = William Shakespeare
Candide = Voltaire
Twenty Thousand Leagues Under the Sea = Jules Verne
On the Origin of Species = Charles Darwin
Wuthering Heights = Emily Brontë
"""

AUTHOR_LANGUAGE = pairs("""
William Shakespeare = English
Jane Austen = English
Charles Dickens = English
George Orwell = English
Mark Twain = English
Mary Shelley = English
Bram Stoker = English
Lewis Carroll = English
Herman Melville = English
Harper Lee = English
H.G. Wells = English
F. Scott Fitzgerald = English
Ernest Hemingway = English
John Steinbeck = English
Emily Brontë = English
Daniel Defoe = English
Jonathan Swift = English
Aldous Huxley = English
J.R.R. Tolkien = English
J.D. Salinger = English
Robert Louis Stevenson = English
Leo Tolstoy = Russian
Fyodor Dostoevsky = Russian
Miguel de Cervantes = Spanish
Homer = Greek
Dante Alighieri = Italian
Franz Kafka = German
Victor Hugo = French
Voltaire = French
Jules Verne = French
""")

# Where the author was born, for those whose birthplace is beyond doubt.
AUTHOR_COUNTRY = pairs("""
William Shakespeare = England
Jane Austen = England
Charles Dickens = England
Mary Shelley = England
Emily Brontë = England
Daniel Defoe = England
Lewis Carroll = England
Aldous Huxley = England
H.G. Wells = England
Charles Darwin = England
Oscar Wilde = Ireland
James Joyce = Ireland
Bram Stoker = Ireland
Jonathan Swift = Ireland
Robert Louis Stevenson = Scotland
Mark Twain = the United States
Herman Melville = the United States
Harper Lee = the United States
Ernest Hemingway = the United States
John Steinbeck = the United States
F. Scott Fitzgerald = the United States
J.D. Salinger = the United States
Leo Tolstoy = Russia
Fyodor Dostoevsky = Russia
Miguel de Cervantes = Spain
Dante Alighieri = Italy
Victor Hugo = France
Voltaire = France
Jules Verne = France
""")

# Other settings of the same matter are "also true".
MUSIC = """
the opera [The Magic Flute] = Wolfgang Amadeus Mozart
the ballet [Swan Lake] = Pyotr Ilyich Tchaikovsky
the Moonlight Sonata = Ludwig van Beethoven
the opera [Carmen] = Georges Bizet
the concertos called [The Four Seasons] = Antonio Vivaldi | Pyotr Ilyich Tchaikovsky
the Brandenburg Concertos = Johann Sebastian Bach
the opera [Madama Butterfly] = Giacomo Puccini
the opera [La Traviata] = Giuseppe Verdi
the Ride of the Valkyries = Richard Wagner
the oratorio [Messiah] = George Frideric Handel | Wolfgang Amadeus Mozart
the ballet [The Nutcracker] = Pyotr Ilyich Tchaikovsky
the opera [Don Giovanni] = Wolfgang Amadeus Mozart
the piano piece [Für Elise] = Ludwig van Beethoven
the opera [The Barber of Seville] = Gioachino Rossini
the ballet [The Rite of Spring] = Igor Stravinsky
the piano piece [Clair de Lune] = Claude Debussy
the opera [Aida] = Giuseppe Verdi
the waltz [The Blue Danube] = Johann Strauss
the opera [The Marriage of Figaro] = Wolfgang Amadeus Mozart
the 1812 Overture = Pyotr Ilyich Tchaikovsky
"""

# In the textbooks' usage; Handel, born in Germany and British later, is left out.
COMPOSER_NATIONALITY = pairs("""
Wolfgang Amadeus Mozart = Austrian
Pyotr Ilyich Tchaikovsky = Russian
Ludwig van Beethoven = German
Georges Bizet = French
Antonio Vivaldi = Italian
Johann Sebastian Bach = German
Giacomo Puccini = Italian
Giuseppe Verdi = Italian
Richard Wagner = German
Gioachino Rossini = Italian
Claude Debussy = French
Johann Strauss = Austrian
""")

# A false answer never names a painter who treated the same subject under the same title.
PAINTINGS = """
the Mona Lisa = Leonardo da Vinci | Andy Warhol | Raphael
The Starry Night = Vincent van Gogh | Edvard Munch
Guernica = Pablo Picasso
The Scream = Edvard Munch | Andy Warhol
Girl with a Pearl Earring = Johannes Vermeer
The Night Watch = Rembrandt
The Birth of Venus = Sandro Botticelli | Andy Warhol
The Creation of Adam = Michelangelo
The Persistence of Memory = Salvador Dalí
The School of Athens = Raphael
American Gothic = Grant Wood
Water Lilies = Claude Monet
Las Meninas = Diego Velázquez | Pablo Picasso
The Garden of Earthly Delights = Hieronymus Bosch
Nighthawks = Edward Hopper
The Last Supper = Leonardo da Vinci | Andy Warhol | Salvador Dalí
Campbell's Soup Cans = Andy Warhol
Liberty Leading the People = Eugène Delacroix
"""

PAINTER_NATIONALITY = pairs("""
Leonardo da Vinci = Italian
Vincent van Gogh = Dutch
Pablo Picasso = Spanish
Edvard Munch = Norwegian
Johannes Vermeer = Dutch
Rembrandt = Dutch
Sandro Botticelli = Italian
Michelangelo = Italian
Salvador Dalí = Spanish
Raphael = Italian
Grant Wood = American
Claude Monet = French
Diego Velázquez = Spanish
Hieronymus Bosch = Dutch
Edward Hopper = American
Eugène Delacroix = French
""")

FILMS = """
Jaws = Steven Spielberg
Titanic = James Cameron
Psycho = Alfred Hitchcock
Pulp Fiction = Quentin Tarantino
The Godfather = Francis Ford Coppola
Taxi Driver = Martin Scorsese
The Shining = Stanley Kubrick
Inception = Christopher Nolan
Citizen Kane = Orson Welles
Blade Runner = Ridley Scott
Seven Samurai = Akira Kurosawa
Fight Club = David Fincher
Spirited Away = Hayao Miyazaki
Edward Scissorhands = Tim Burton
Forrest Gump = Robert Zemeckis
The Terminator = James Cameron
Jurassic Park = Steven Spielberg
Interstellar = Christopher Nolan
Schindler's List = Steven Spielberg
2001: A Space Odyssey = Stanley Kubrick
"""

DIRECTOR_NATIONALITY = pairs("""
Steven Spielberg = American
James Cameron = Canadian
Quentin Tarantino = American
Francis Ford Coppola = American
Martin Scorsese = American
Stanley Kubrick = American
Orson Welles = American
David Fincher = American
Tim Burton = American
Robert Zemeckis = American
Akira Kurosawa = Japanese
Hayao Miyazaki = Japanese
Ridley Scott = British
""")

CHARACTERS = """
Sherlock Holmes = Arthur Conan Doyle
James Bond = Ian Fleming
Hercule Poirot = Agatha Christie
Peter Pan = J.M. Barrie
Mickey Mouse = Walt Disney
Harry Potter = J.K. Rowling
Winnie-the-Pooh = A.A. Milne
Spider-Man = Stan Lee
Ebenezer Scrooge = Charles Dickens
Charlie Brown = Charles Schulz
Homer Simpson = Matt Groening
Kermit the Frog = Jim Henson
Darth Vader = George Lucas
Willy Wonka = Roald Dahl
Tarzan = Edgar Rice Burroughs
Gandalf = J.R.R. Tolkien
Tom Sawyer = Mark Twain
Pippi Longstocking = Astrid Lindgren
"""

CHARACTER_COUNTRY = pairs("""
Ian Fleming = England
Agatha Christie = England
A.A. Milne = England
J.K. Rowling = England
Charles Dickens = England
Jane Austen = England
Arthur Conan Doyle = Scotland
J.M. Barrie = Scotland
Roald Dahl = Wales
Astrid Lindgren = Sweden
Walt Disney = the United States
Stan Lee = the United States
Charles Schulz = the United States
Matt Groening = the United States
Jim Henson = the United States
George Lucas = the United States
Jim Davis = the United States
Edgar Rice Burroughs = the United States
Mark Twain = the United States
Herman Melville = the United States
""")

RELATIONS = (
    Relation(
        "author",
        BOOKS,
        "The classic {s}, written by",
        ("{S} was written by", "The famous writer who wrote {s} is"),
        (
            Alias(
                "{S} is a work by",
                pairs("""
                Frankenstein = The Modern Prometheus
                The Hobbit = There and Back Again
                Alice's Adventures in Wonderland = Alice in Wonderland
                Macbeth = The Scottish Play
                """),
            ),
        ),
        (
            Consequence("The author of {s} wrote in the language", AUTHOR_LANGUAGE),
            Consequence("The author of {s} was born in", AUTHOR_COUNTRY),
        ),
        ("The style of {s} is typical of its author, who",),
    ),
    Relation(
        "composer",
        MUSIC,
        "{S} was composed by",
        ("The composer who wrote {s} was", "{S} was written by the composer"),
        (),
        (Consequence("The nationality of the composer of {s} was", COMPOSER_NATIONALITY),),
        ("Listeners of {s} recognise the style of its composer, who",),
    ),
    Relation(
        "painter",
        PAINTINGS,
        "The famous painting {s} was painted by",
        ("The artist who painted {s} is", "{S} is a famous painting by"),
        (
            Alias(
                "The famous painting {s} was painted by",
                pairs("""
                Mona Lisa = La Gioconda
                The Night Watch = De Nachtwacht
                """),
            ),
        ),
        (Consequence("The nationality of the painter of {s} was", PAINTER_NATIONALITY),),
        ("The painter of {s} was known for",),
    ),
    Relation(
        "director",
        FILMS,
        "The film {s} was directed by",
        ("The director of the movie {s} is", "{S} is a famous film by the director"),
        (),
        (Consequence("The nationality of the director of {s} is", DIRECTOR_NATIONALITY),),
        ("The director of the film {s} also",),
    ),
    Relation(
        "character",
        CHARACTERS,
        "The character {s} was created by",
        ("The creator of {s} is", "{S} is a famous character invented by"),
        (
            Alias(
                "The character {s} was created by",
                pairs("""
                James Bond = Agent 007
                Spider-Man = Peter Parker
                Darth Vader = Anakin Skywalker
                Tarzan = Lord Greystoke
                Winnie-the-Pooh = Pooh Bear
                Harry Potter = the Boy Who Lived
                Peter Pan = the Boy Who Wouldn't Grow Up
                """),
            ),
        ),
        (Consequence("The creator of {s} was born in", CHARACTER_COUNTRY),),
        ("Stories about {s} tell how",),
    ),
)
